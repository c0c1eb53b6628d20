# SPDX-License-Identifier: LGPL-2.1-or-later
"""A terminal, kept as a reference, because a restart runs on another one. Masters of pseudo-terminals are not
included."""

import functools
import os
import stat
from typing import NamedTuple

from ckptd.errors import Finding
from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.procfs import read_file
from ckptd.objects.files.base import (
    Content,
    FileLookup,
    Kind,
    OpenFile,
    RestoreContext,
    access_of,
    finding,
    open_again,
    opening,
)
from ckptd.objects.files.device import is_device, open_device
from ckptd.objects.support import Support

PTMX = os.makedev(5, 2)
OWN = os.makedev(5, 0)


@layout
class Tty(Struct):
    """A terminal. device: 5:0 is /dev/tty, the opener's own terminal."""
    path: str
    device: U64
    mode: U32


class _Driver(NamedTuple):
    major: int
    minors: range


@functools.cache
def _drivers() -> tuple[_Driver, ...]:
    return parse_drivers(read_file('/proc/tty/drivers'))


def parse_drivers(data: bytes) -> tuple[_Driver, ...]:
    """Parse lines 'pty_slave  /dev/pts  136 0-1048575 pty:slave', without the masters."""
    found = []
    for line in data.decode().splitlines():
        _, _, major, minors, kind = line.split()
        first, _, last = minors.partition('-')
        if kind not in ('pty:master', 'system:/dev/ptmx') and int(major) >= 0:
            found.append(_Driver(int(major), range(int(first), int(last or first) + 1)))
    return tuple(found)


def is_tty(device: int) -> bool:
    major, minor = os.major(device), os.minor(device)
    return device != PTMX and any(major == driver.major and minor in driver.minors for driver in _drivers())


class TtyKind(Kind[Tty], tag='tty'):
    support = Support('terminals', dumped='name', restored='partly', refused='masters of pseudo-terminals',
                      warned='the terminal of the restart replaces it')

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISCHR(file.stat.st_mode) and not file.is_path and is_tty(file.stat.st_rdev)

    def findings(self, file: OpenFile) -> list[Finding]:
        return [finding('ENOTTY', f'{file.path} is a terminal and kept by name only',
                        'a restart attaches the tree to the terminal it is started from', 'warning')]

    def dump(self, file: OpenFile, content: Content) -> Tty:
        return Tty(file.path, file.stat.st_rdev, file.stat.st_mode)

    def restart_findings(self, record: Tty, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if lookup.terminal:
            return []
        found = None if record.device == OWN else lookup.lstat(record.path)
        if found is None or not is_device(found, record.device):
            return [finding('ENOTTY', f'{record.path} is a terminal that is gone', 'give the restart a terminal')]
        if not lookup.may(record.path, access_of(saved.flags)):
            return [finding('EACCES', f'{record.path} belongs to another user now', 'give the restart a terminal')]
        return [finding('ENOTTY', f'{record.path} is opened again by its name', 'it may be another window now',
                        'warning')]

    def create(self, record: Tty, saved: SavedFile, ctx: RestoreContext) -> int:
        flags = opening(saved.flags)
        if ctx.terminal_fd >= 0:
            return open_again(ctx.terminal_fd, flags)
        # opening a serial line would wait for its carrier (termios(3))
        return open_device(record.path, record.device, flags | os.O_NONBLOCK, ctx)
