# SPDX-License-Identifier: LGPL-2.1-or-later
"""maps and smaps, with paths that try to break them."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ckptd.kernel.maps import Mapping, parse_maps, parse_smaps, read_maps, read_smaps

MAPS = (b'55e880e9b000-55e880e9d000 r--p 00002000 fe:00 260386                     /usr/bin/head\n'
        b'55e880eaa000-55e880ecb000 rw-p 00000000 00:00 0                          [heap]\n'
        b'7f0000000000-7f0000001000 rwxs 00000000 00:01 1025                       /memfd:a b (deleted)\n'
        b'7f0000001000-7f0000002000 ---p 00000000 00:00 0 \n'
        b'7f0000002000-7f0000003000 rw-p 00000000 00:00 0                          [anon:my name]\n'
        b'7f0000003000-7f0000004000 r--p 00000000 fe:00 7                          /tmp/a  b\\012c \r (deleted)\n'
        b'ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n')
FIELDS = (b'Size:                  8 kB\nKernelPageSize:        4 kB\nRss:                   %d kB\n'
          b'Pss:                   7 kB\nSwap:                  %d kB\nSwapPss:               1 kB\n'
          b'Locked:                %d kB\nTHPeligible:           0\nProtectionKey:         0\nVmFlags: %s\n')


def test_captured_maps() -> None:
    found = parse_maps(MAPS)
    assert found[0] == Mapping(0x55E880E9B000, 0x55E880E9D000, True, False, False, False, 0x2000, 0xFE, 0, 260386,
                               '/usr/bin/head')
    assert [mapping.path for mapping in found[1:]] == [
        '[heap]', '/memfd:a b (deleted)', '', '[anon:my name]', '/tmp/a  b\\012c \r (deleted)', '[vsyscall]']
    assert [mapping.deleted for mapping in found] == [False, False, True, False, False, True, False]
    assert [mapping.file_path for mapping in found] == [
        '/usr/bin/head', '', '/memfd:a b', '', '', '/tmp/a  b\nc \r', '']
    assert (found[2].read, found[2].write, found[2].execute, found[2].shared) == (True, True, True, True)
    assert found[-1].end == 0xFFFFFFFFFF601000
    assert found[0].size == 0x2000


def test_captured_smaps() -> None:
    lines = MAPS.split(b'\n')[:-1]
    found = parse_smaps(b''.join(line + b'\n' + FIELDS % (n * 4, n * 8, n * 12, b'rd wr mr sd ')
                                 for n, line in enumerate(lines)))
    assert [mapping[:11] for mapping in found] == [mapping[:11] for mapping in parse_maps(MAPS)]
    assert all(mapping.vm_flags == {'rd', 'wr', 'mr', 'sd'} for mapping in found)


def test_smaps_of_no_memory() -> None:
    assert parse_smaps(b'') == []


def test_a_mapping_of_our_own(tmp_path: Path) -> None:
    path = tmp_path / 'a file with\na newline and ünicode (deleted)'
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ):
        found, = (mapping for mapping in read_maps(os.getpid()) if mapping.inode == path.stat().st_ino)
    assert (found.size, found.shared, found.read, found.write) == (3 * mmap.PAGESIZE, True, True, False)
    assert found.path.endswith('ünicode (deleted)')
    assert os.makedev(found.major, found.minor) == path.stat().st_dev
    # a name that ends so looks deleted; what is left of it names no file
    assert not Path(found.file_path).exists()


def test_this_process_as_psutil_has_it() -> None:
    ours = {f'{mapping.start:x}-{mapping.end:x}': mapping for mapping in read_smaps(os.getpid())}
    theirs = {row.addr.lstrip('0'): row for row in psutil.Process().memory_maps(grouped=False)}
    same = ours.keys() & theirs.keys()      # the heap may grow between the two looks
    assert len(same) > 0.8 * len(ours)
    paths = {'[anon]' if not ours[key].path else ours[key].path: theirs[key].path for key in same}
    assert all(our == their for our, their in paths.items())


def test_maps_and_smaps_agree_about_a_child(forked: Callable[..., int]) -> None:
    pid = forked()
    assert [mapping[:11] for mapping in read_maps(pid)] == [mapping[:11] for mapping in read_smaps(pid)]


def test_a_zombie_has_none(forked: Callable[..., int]) -> None:
    pid = forked()
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert read_maps(pid) == read_smaps(pid) == []
    with pytest.raises(ProcessLookupError):
        read_maps(2**22 + 1)


def test_size_of_huge_pages() -> None:
    line = b'7f0000000000-7f0000400000 rw-p 00000000 00:10 7    /anon_hugepage (deleted)\n'
    block = line + b'Size:               4096 kB\nKernelPageSize:     2048 kB\nMMUPageSize:        2048 kB\nVmFlags: '
    assert [one.huge for one in parse_smaps(block + b'rd wr ht sd\n')] == [2 << 20]
    assert [one.huge for one in parse_smaps(block + b'rd wr sd\n')] == [0]
