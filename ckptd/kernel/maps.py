# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/maps and smaps: the memory mappings of a process (proc_pid_maps(5), proc_pid_smaps(5))."""

import os
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from ckptd.kernel.procfs import read_memory_file, task_dir, text

DELETED = ' (deleted)'


class Mapping(NamedTuple):
    """One virtual memory area."""
    start: int    # bytes
    end: int      # bytes
    read: bool
    write: bool
    execute: bool
    shared: bool
    offset: int    # bytes
    major: int
    minor: int
    inode: int
    path: str                                 # '' for nameless anonymous memory, else a path (perhaps with '
                                              # (deleted)'), '[heap]', '[anon:NAME]' ...
    vm_flags: frozenset[str] = frozenset()    # two-letter codes of smaps; empty if read from maps
    pkey: int = 0                             # protection key (pkeys(7)); 0 if read from maps
    huge: int = 0                             # size of a huge page (hugetlb) in bytes; 0 for others, or if read from
                                              # maps

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def anonymous(self) -> bool:
        """Whether no file is mapped. An inode of 0 alone does not show that: the first System V segment has it, too."""
        return not self.inode and not self.path.startswith('/')

    @property
    def deleted(self) -> bool:
        """Whether the kernel reports that the file has no name. A name may also end like this, so inode and stat(2)
        decide."""
        return self.path.endswith(DELETED)

    @property
    def file_path(self) -> str:
        """Path of the mapped file without ' (deleted)', or '' if no file is mapped."""
        if not self.path.startswith('/'):
            return ''
        # the kernel escapes no character here but newline (seq_file_path(m, file, "\n"))
        return self.path.removesuffix(DELETED).replace('\\012', '\n')


def parse_maps(data: bytes) -> list[Mapping]:
    """Parse mappings in ascending order. A path may contain any byte but newline, so lines end at newlines only."""
    return [_parse_line(line) for line in data.split(b'\n') if line]


def parse_smaps(data: bytes) -> list[Mapping]:
    """Parse mappings with the flags of smaps."""
    # each mapping is its line of maps, some twenty "Name: value" lines, and VmFlags as the last one
    found: list[Mapping] = []
    blocks = data.split(b'\nVmFlags:')
    line, key = blocks[0].partition(b'\n')[0], _pkey(blocks[0])
    for before, block in pairwise(blocks):
        flags, _, after = block.partition(b'\n')
        found.append(_parse_line(line)._replace(vm_flags=_flags(flags), pkey=key,
                                                huge=_page_size(before) if b' ht' in flags else 0))
        line, key = after.partition(b'\n')[0], _pkey(after)
    return found


def read_maps(pid: int) -> list[Mapping]:
    """Read the mappings of a process; none for a kernel thread or a zombie. PermissionError without PTRACE_MODE_READ
    access."""
    return parse_maps(read_memory_file(task_dir(pid), 'maps'))


def read_smaps(pid: int) -> list[Mapping]:
    """Read the mappings with flags. The kernel walks every page table for this: some milliseconds per GiB of touched
    memory."""
    return parse_smaps(read_memory_file(task_dir(pid), 'smaps'))


def map_file(pid: int, mapping: Mapping) -> str:
    """Return a magic link to the mapped file itself, deleted or not (proc_pid_map_files(5)). Following it needs
    CAP_CHECKPOINT_RESTORE."""
    return f'/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}'


def stat_mapped(pid: int, mapping: Mapping) -> os.stat_result | None:
    """Return stat(2) of the mapped file; None if that is not allowed or the mapping is gone."""
    try:
        return os.stat(map_file(pid, mapping))  # noqa: PTH116
    except (PermissionError, FileNotFoundError):
        return None


def _parse_line(line: bytes) -> Mapping:
    area, modes, offset, device, inode, *path = line.split(None, 5)
    start, end = area.split(b'-')
    major, minor = device.split(b':')
    return Mapping(int(start, 16), int(end, 16), modes[0] == 0x72, modes[1] == 0x77, modes[2] == 0x78, modes[3] == 0x73,
                   int(offset, 16), int(major, 16), int(minor, 16), int(inode), text(path[0]) if path else '')


def _pkey(block: bytes) -> int:
    """Parse the field in front of VmFlags. Without protection keys in the processor there is no such field."""
    name, _, value = block.rpartition(b'\n')[2].partition(b':')
    return int(value) if name == b'ProtectionKey' else 0


def _page_size(block: bytes) -> int:
    """Parse the field KernelPageSize, in kB; 0 if there is none."""
    _, found, value = block.rpartition(b'\nKernelPageSize:')
    return int(value.split(None, 1)[0]) << 10 if found else 0


@lru_cache(maxsize=256)     # a process has thousands of mappings and a dozen sets of flags
def _flags(value: bytes) -> frozenset[str]:
    return frozenset(value.decode().split())
