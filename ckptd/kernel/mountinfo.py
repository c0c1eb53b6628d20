# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/mountinfo (proc_pid_mountinfo(5))."""

import re
from typing import NamedTuple

from ckptd.kernel.procfs import read_task_file, text

_ESCAPE = re.compile(rb'\\([0-7]{3})')


class Mount(NamedTuple):
    """One mount of a mount namespace. root: the directory of the file system that is mounted at mount_point."""
    id: int
    parent: int
    major: int
    minor: int
    root: str
    mount_point: str
    options: tuple[str, ...]
    fs_type: str
    source: str
    super_options: tuple[str, ...]


def parse_mountinfo(data: bytes) -> list[Mount]:
    """Parse mounts in the kernel's order: of two at one mount point the later one is on top."""
    return [_parse_line(line) for line in data.split(b'\n') if line]


def read_mountinfo(pid: int | None = None) -> list[Mount]:
    """Read the mounts that a process sees, by default the caller."""
    return parse_mountinfo(read_task_file('/proc/self' if pid is None else f'/proc/{pid}', 'mountinfo'))


def _parse_line(line: bytes) -> Mount:
    # between the sixth field and ' - ' there are any number of optional ones
    before, _, after = line.partition(b' - ')
    number, parent, device, root, point, options, *_ = before.split(b' ')
    fs_type, source, super_options = [*after.split(b' '), b'', b''][:3]
    major, minor = device.split(b':')
    return Mount(int(number), int(parent), int(major), int(minor), _unescape(root), _unescape(point),
                 tuple(text(options).split(',')), _unescape(fs_type), _unescape(source),
                 tuple(_unescape(super_options).split(',')))


def _unescape(value: bytes) -> str:
    # blank, tab, newline, '#' and backslash are octal
    return text(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), value))
