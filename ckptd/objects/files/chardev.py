# SPDX-License-Identifier: LGPL-2.1-or-later
"""Character devices without state: null, zero, full, random, urandom."""

import os
import stat

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, access_of, finding, opening
from ckptd.objects.files.deleted import deleted_findings, device_findings, make_device
from ckptd.objects.files.device import is_device, open_device
from ckptd.objects.support import Support

# Documentation/admin-guide/devices.txt
STATELESS = {os.makedev(1, 3): 'null', os.makedev(1, 5): 'zero', os.makedev(1, 7): 'full', os.makedev(1, 8): 'random',
             os.makedev(1, 9): 'urandom'}


@layout
class CharacterDevice(Struct):
    """A character device."""
    path: str
    device: U64         # its number, which identifies the device at any path
    mode: U32
    deleted: U8 = 0     # the node is made again


class CharacterDeviceKind(Kind[CharacterDevice], tag='chardev'):
    support = Support('devices null, zero, full, random and urandom', dumped='name', refused='other devices')

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISCHR(file.stat.st_mode) and file.stat.st_rdev in STATELESS and not file.is_path

    def dump(self, file: OpenFile, content: Content) -> CharacterDevice:
        return CharacterDevice(file.path, file.stat.st_rdev, file.stat.st_mode, file.deleted)

    def restart_findings(self, record: CharacterDevice, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if record.deleted:
            return [*deleted_findings(record.path, lookup), *device_findings(record.path, lookup)]
        found = lookup.lstat(record.path)
        if found is None:
            return [finding('ENOENT', f'{record.path} is missing', 'make the device again (mknod)')]
        if not is_device(found, record.device):
            return [finding('ENODEV', f'{record.path} is another file than the device '
                            f'{os.major(record.device)}:{os.minor(record.device)}', 'make the device again (mknod)')]
        if not lookup.may(record.path, access_of(saved.flags)):
            return [finding('EACCES', f'{record.path} cannot be opened', 'run as its owner, or as root')]
        return []

    def create(self, record: CharacterDevice, saved: SavedFile, ctx: RestoreContext) -> int:
        if record.deleted:
            return self._make(record, saved, ctx)
        return open_device(record.path, record.device, opening(saved.flags), ctx)

    @staticmethod
    def _make(record: CharacterDevice, saved: SavedFile, ctx: RestoreContext) -> int:
        if record.device not in STATELESS:
            raise CkptError(f'{record.path} was deleted, and is a device that has a state', resource=record.path)
        mode = stat.S_IFCHR | stat.S_IMODE(record.mode)
        return make_device(record.path, mode, record.device, opening(saved.flags), ctx)
