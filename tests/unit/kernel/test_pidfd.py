# SPDX-License-Identifier: LGPL-2.1-or-later
"""pidfds."""

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from ckptd.kernel import pidfd


@pytest.fixture
def child(forked: Callable[..., int]) -> Iterator[tuple[int, int]]:
    """(pid, pidfd)"""
    pid = forked()
    fd = pidfd.pidfd_open(pid)
    yield pid, fd
    os.close(fd)


def test_close_on_exec_and_its_pid(child: tuple[int, int]) -> None:
    pid, fd = child
    assert not os.get_inheritable(fd)
    assert pidfd.pidfd_pid(fd) == pid


def test_death(child: tuple[int, int]) -> None:
    pid, fd = child
    assert not pidfd.wait_dead(fd, 0)
    pidfd.pidfd_send_signal(fd, signal.SIGTERM)
    assert pidfd.wait_dead(fd, 5)
    assert pidfd.wait_dead(fd)
    assert pidfd.pidfd_pid(fd) == pid       # a zombie still has it
    os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT)


def test_reaped() -> None:
    pid = os.posix_spawn('/bin/true', ['true'], {})
    fd = pidfd.pidfd_open(pid)
    try:
        os.waitpid(pid, 0)
        assert pidfd.pidfd_pid(fd) == -1
        with pytest.raises(ProcessLookupError):
            pidfd.pidfd_send_signal(fd, 0)
    finally:
        os.close(fd)
    with pytest.raises(ProcessLookupError):
        pidfd.pidfd_open(pid)


@pytest.mark.needs('ptrace')
def test_getfd_is_the_same_open_file(forked: Callable[..., int]) -> None:
    reader, writer = os.pipe()
    pid = forked(lambda: os.dup2(reader, 300))
    fd = pidfd.pidfd_open(pid)
    copy = pidfd.pidfd_getfd(fd, 300)
    try:
        os.write(writer, b'x')
        assert os.read(copy, 1) == b'x'
        assert not os.get_inheritable(copy)
        with pytest.raises(OSError, match='pidfd_getfd: Bad file descriptor'):
            pidfd.pidfd_getfd(fd, 301)
    finally:
        for each in (reader, writer, fd, copy):
            os.close(each)


def test_a_pidfd_of_one_thread() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        fd = pidfd.pidfd_open(thread.native_id or 0, pidfd.PIDFD_THREAD)
    except OSError:
        pytest.skip('needs PIDFD_THREAD (Linux 6.9)')
    finally:
        go.set()
        thread.join()
    try:
        assert pidfd.wait_dead(fd, 5)
    finally:
        os.close(fd)


def test_no_pidfd_at_all() -> None:
    with pytest.raises(KeyError):
        pidfd.pidfd_pid(0)
