# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mapped file."""

import os
import stat

from ckptd.errors import Finding
from ckptd.image.records import FILE_PRIVATE, FILE_SHARED
from ckptd.kernel.maps import Mapping, map_file, stat_mapped
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.shmem import is_object_of_shm_mount, is_of_shm_mount
from ckptd.objects.files.base import finding
from ckptd.objects.files.linked import DeletedFile, link_findings
from ckptd.objects.mappings.base import RELEASE, MappingKind

_DEV_ZERO = os.makedev(1, 5)


class FileMapping(MappingKind, numbers=[FILE_PRIVATE, FILE_SHARED]):
    """A mapping of a file with a name, or of one that has lost its name."""

    def __init__(self) -> None:
        self._checked: dict[tuple[int, int, int, str], Finding | None] = {}

    def matches(self, mapping: Mapping) -> bool:
        return not mapping.anonymous and not is_object_of_shm_mount(mapping)

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        """Check a file once, because a thousand processes may map the same libraries. A warning appears once in the
        tree."""
        if not mapping.path.startswith('/') or is_of_shm_mount(mapping):
            return None
        key = (mapping.major, mapping.minor, mapping.inode, mapping.path)
        if key in self._checked:
            return self._checked[key]
        found = _check_file(tid, mapping)
        self._checked[key] = found if found and found.severity == 'refusal' else None
        return found


def _check_file(tid: int, mapping: Mapping) -> Finding | None:
    mapped = stat_mapped(tid, mapping)
    named = lstat_of_task(tid, mapping.file_path)
    is_there = named is not None and named.st_ino == (mapped.st_ino if mapped else mapping.inode)
    of = mapped or (named if is_there else None)
    if of and stat.S_ISCHR(of.st_mode):
        return None if of.st_rdev == _DEV_ZERO else _device('character', mapping, of)
    if of and stat.S_ISBLK(of.st_mode):
        return _device('block', mapping, of)
    if is_there:
        return None
    if mapped is None and mapping.deleted:
        return finding('EPERM', f'{mapping.file_path} is deleted and its content cannot be read',
                       'run ckptd as root (it needs CAP_CHECKPOINT_RESTORE for /proc/PID/map_files)')
    if mapping.deleted and mapped and mapped.st_nlink:
        file = DeletedFile(tid, tid, mapping.file_path, mapped, map_file(tid, mapping))
        return next(iter(link_findings(file)), None)
    if mapping.deleted:
        return None         # its content goes into the image
    return finding('ENOENT', f'{mapping.path} is another file now, or hidden by a mount',
                   'a restart maps files by path: remove the mount or put the file back', 'warning')


def _device(sort: str, mapping: Mapping, of: os.stat_result) -> Finding:
    number = f'{os.major(of.st_rdev)}:{os.minor(of.st_rdev)}'
    return finding('EOPNOTSUPP', f'memory of the {sort} device {number}: {mapping.path}', RELEASE)
