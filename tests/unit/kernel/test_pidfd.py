# SPDX-License-Identifier: LGPL-2.1-or-later
"""pidfds."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from ckptd.kernel import pidfd
from ckptd.kernel.stat import read_stat


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


def test_start_time(child: tuple[int, int]) -> None:
    pid, fd = child
    assert pidfd.pidfd_start_time(fd, pid) == read_stat(pid).start_time
    os.kill(pid, signal.SIGKILL)
    assert pidfd.wait_dead(fd, 5)
    assert pidfd.pidfd_start_time(fd, pid) == -1        # a zombie still has one
    # the number has gone to somebody else, who lives
    assert pidfd.pidfd_start_time(fd, os.getpid()) == -1


def test_held_process(child: tuple[int, int]) -> None:
    pid, _ = child
    began, uid = read_stat(pid).start_time, os.getuid()
    seen = []
    for start_time, owner in ((0, -1), (began, -1), (began, uid)):
        with pidfd.held(pid, start_time, owner):
            seen.append(pid)
    assert seen == [pid] * 3


@pytest.mark.parametrize('start_time', [-1, 1, 1 << 60])
def test_the_number_is_another_process_now(child: tuple[int, int], start_time: int) -> None:
    with pytest.raises(ProcessLookupError), pidfd.held(child[0], start_time):
        raise AssertionError('what is read here would be of a stranger')


def test_a_process_that_is_gone_when_asked_for() -> None:
    pid = os.posix_spawn('/bin/true', ['true'], {})
    os.waitpid(pid, 0)
    for number in (pid, 0, -1):
        with pytest.raises(ProcessLookupError), pidfd.held(number):
            raise AssertionError('there is nobody to read of')


def end(pid: int, options: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | options)


@pytest.mark.parametrize('options', [os.WNOWAIT, 0], ids=['a zombie', 'reaped'])
def test_a_process_that_ends_while_it_is_read(options: int) -> None:
    pid = os.posix_spawn('/bin/sleep', ['sleep', '1000'], {})
    with pytest.raises(ProcessLookupError), pidfd.held(pid, read_stat(pid).start_time, os.getuid()):
        end(pid, options)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def test_the_number_of_a_thread_is_no_process() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        with pytest.raises(ProcessLookupError), pidfd.held(thread.native_id or 0):
            raise AssertionError('a process had this number')
    finally:
        go.set()
        thread.join()


@pytest.mark.needs('root')
@pytest.mark.parametrize('uids', [(0, 0, 0), (7, 0, 0), (7, 7, 0), (7, 0, 7)])
def test_a_program_with_set_user_id_is_not_its_users_alone(forked: Callable[..., int],
                                                           uids: tuple[int, int, int]) -> None:
    pid = forked(lambda: os.setresuid(*uids))
    with pidfd.held(pid):
        pass
    with pytest.raises(ProcessLookupError), pidfd.held(pid, read_stat(pid).start_time, 7):
        pass
