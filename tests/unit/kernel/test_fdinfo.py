# SPDX-License-Identifier: LGPL-2.1-or-later
"""fdinfo, and the list of fds."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ckptd.kernel.fdinfo import list_fds, parse_fdinfo, read_fdinfo
from ckptd.kernel.fhandle import FileHandle
from ckptd.kernel.inotify import (
    IN_EXCL_UNLINK,
    IN_MODIFY,
    IN_ONESHOT,
    IN_ONLYDIR,
    Inotify,
    InotifyWatch,
    watches_of,
)


def test_captured_epoll() -> None:
    info = parse_fdinfo(b'pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t2057\n'
                        b'tfd:        5 events:       19 data:                5  pos:0 ino:6a sdev:d\n'
                        b'tfd:        7 events: 80000019 data:                7  pos:0 ino:6b sdev:d\n')
    assert (info.pos, info.flags, info.mnt_id, info.ino) == (0, os.O_CLOEXEC | os.O_RDWR, 15, 2057)
    assert [row.split()[0] for row in info.fields['tfd']] == ['5', '7']


def test_captured_inotify_and_locks_on_an_old_kernel() -> None:
    info = parse_fdinfo(b'pos:\t12\nflags:\t0100000\nmnt_id:\t9\n'
                        b'lock:\t1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF\n'
                        b'inotify wd:2 ino:9e7e sdev:800013 mask:800afce ignored_mask:0\n'
                        b'inotify wd:1 ino:192627 sdev:800013 mask:800afce ignored_mask:0\n')
    assert (info.pos, info.ino) == (12, 0)
    assert info.fields['lock'] == ['1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF']
    assert [row.split()[0] for row in info.fields['inotify']] == ['wd:2', 'wd:1']


def test_captured_timerfd() -> None:
    info = parse_fdinfo(b'pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1\nclockid: 1\nticks: 0\nsettime flags: 01\n'
                        b'it_value: (0, 49406829)\nit_interval: (1, 0)\n')
    assert info.fields['it_value'] == ['(0, 49406829)']
    assert info.fields['settime'] == ['flags: 01']


def test_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / 'file'
    path.write_bytes(b'0123456789')
    with path.open('ab+', buffering=0) as file:
        file.seek(4)
        info = read_fdinfo(os.getpid(), file.fileno())
        assert info.pos == 4
        assert info.flags & (os.O_APPEND | os.O_CLOEXEC | os.O_ACCMODE) == os.O_APPEND | os.O_CLOEXEC | os.O_RDWR
        assert info.ino in (0, path.stat().st_ino)
        os.set_inheritable(file.fileno(), True)
        assert not read_fdinfo(os.getpid(), file.fileno()).flags & os.O_CLOEXEC


def test_fds_of_a_child_as_psutil_has_them(forked: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / 'file'
    pid = forked(lambda: os.dup2(os.open(path, os.O_CREAT | os.O_RDWR), 200))
    fds = list_fds(pid)
    assert fds == sorted(fds)
    assert psutil.Process(pid).num_fds() == len(fds)
    assert {file.fd for file in psutil.Process(pid).open_files()} <= set(fds)
    assert 200 in fds


def test_a_closed_fd_is_not_a_dead_process(forked: Callable[..., int]) -> None:
    with pytest.raises(FileNotFoundError):
        read_fdinfo(forked(), 999)
    with pytest.raises(ProcessLookupError):
        read_fdinfo(2**22 + 1, 0)
    with pytest.raises(ProcessLookupError):
        list_fds(2**22 + 1)


def test_watches_with_and_without_handles() -> None:
    """All numbers are hexadecimal; the newest watch is the first line."""
    info = parse_fdinfo(b'pos:\t0\nflags:\t04000\nmnt_id:\t15\nino:\t2057\n'
                        b'inotify wd:b ino:1 sdev:1a mask:fff ignored_mask:0 fhandle-bytes:c fhandle-type:81 '
                        b'f_handle:010000000000000000000000\n'
                        b'inotify wd:2 ino:20c03c sdev:fe00010 mask:84000002 ignored_mask:0 fhandle-bytes:8 '
                        b'fhandle-type:1 f_handle:3cc020000859a8da\n'
                        b'inotify wd:1 ino:192627 sdev:800013 mask:800afce ignored_mask:0\n')
    assert watches_of(info) == [
        InotifyWatch(1, 0xFCE, os.makedev(8, 0x13), 0x192627, FileHandle(-1, b'')),
        InotifyWatch(2, IN_MODIFY | IN_EXCL_UNLINK | IN_ONESHOT, os.makedev(254, 16), 0x20c03c,
                     FileHandle(1, bytes.fromhex('3cc020000859a8da'))),
        InotifyWatch(11, 0xFFF, os.makedev(0, 0x1a), 1, FileHandle(0x81, b'\1' + bytes(11)))]


def test_watches_as_this_kernel_shows_them(tmp_path: Path) -> None:
    with Inotify() as ours:
        ours.add(tmp_path, IN_MODIFY | IN_ONESHOT | IN_EXCL_UNLINK | IN_ONLYDIR)
        [watch] = watches_of(read_fdinfo(os.getpid(), ours.fd))
    assert (watch.wd, watch.mask, watch.inode) == (1, IN_MODIFY | IN_ONESHOT | IN_EXCL_UNLINK, tmp_path.stat().st_ino)
