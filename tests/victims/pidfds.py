# SPDX-License-Identifier: LGPL-2.1-or-later
"""pidfds of tasks of the tree, processes and threads (PIDFD_THREAD): alive, a zombie, dead and reaped."""

import fcntl
import os
import select
import signal
import struct
import threading
from pathlib import Path

from victim import not_the_one_to_report, ready, wait_for_go

INFO = struct.Struct('=2Q11Ii')         # struct pidfd_info of <linux/pidfd.h>
GET_INFO = 3 << 30 | INFO.size << 16 | 0xFF << 8 | 11
EXIT = 1 << 3
THREAD = os.O_EXCL       # PIDFD_THREAD, since Linux 6.9


def start(status: int | None) -> int:
    """A child that ends with this exit status, or waits for a signal."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        os.read(reader, 1)      # it allocates nothing any more
        os.close(reader)
        return child
    not_the_one_to_report()
    os.close(reader)
    os.close(writer)
    while status is None:
        signal.pause()
    os._exit(status)


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def exit_code(pidfd: int) -> int | None:
    """The wait status by PIDFD_GET_INFO; None where the kernel does not tell."""
    info = bytearray(INFO.pack(EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, GET_INFO, info)
    except OSError:
        return None
    mask, *_, code = INFO.unpack(info)
    return code if mask & EXIT else None


class Threads:
    """Threads and their pidfds: one waits, one has ended, and one is the leader of the process."""

    def __init__(self) -> None:
        self._writers: dict[threading.Thread, int] = {}
        self._waits, ended = self._start(), self._start()
        self._pidfds = [os.pidfd_open(task, THREAD) for task in (self._waits.native_id, os.getpid(), ended.native_id)]
        self._flagged = os.pidfd_open(self._waits.native_id, THREAD | os.O_NONBLOCK)
        self._let_go(ended)

    def _start(self) -> threading.Thread:
        reader, writer = os.pipe()
        thread = threading.Thread(target=os.read, args=(reader, 1), daemon=True)
        thread.start()
        self._writers[thread] = writer
        return thread

    def _let_go(self, thread: threading.Thread) -> None:
        os.write(self._writers[thread], b'x')
        thread.join()

    def check(self) -> None:
        of_waiting, of_leader, of_ended = self._pidfds
        assert [task_of(pidfd) for pidfd in self._pidfds] == [self._waits.native_id, os.getpid(), -1]
        assert all(fcntl.fcntl(pidfd, fcntl.F_GETFL) & THREAD for pidfd in self._pidfds)
        assert fcntl.fcntl(self._flagged, fcntl.F_GETFL) & (THREAD | os.O_NONBLOCK) == THREAD | os.O_NONBLOCK
        assert [has_ended(pidfd) for pidfd in self._pidfds] == [False, False, True]
        assert os.fstat(of_waiting).st_ino == os.fstat(self._flagged).st_ino != os.fstat(of_leader).st_ino
        signal.pidfd_send_signal(of_waiting, 0)
        self._let_go(self._waits)
        assert await_end(of_waiting)
        assert not has_ended(of_leader)
        assert has_ended(of_ended)


def is_there() -> bool:
    """Whether this kernel has PIDFD_THREAD."""
    try:
        os.close(os.pidfd_open(os.getpid(), THREAD))
    except OSError:
        return False
    return True


def task_of(pidfd: int) -> int:
    """The task of a pidfd, -1 if it is dead and reaped."""
    lines = Path(f'/proc/self/fdinfo/{pidfd}').read_text().splitlines()
    return int(next(line for line in lines if line.startswith('Pid:')).split()[1])


def await_end(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(10_000))


def main() -> None:
    alive, zombie, reaped, killed = start(None), start(3), start(7), start(None)
    itself = os.pidfd_open(os.getpid())
    of_alive, of_zombie = os.pidfd_open(alive, os.O_NONBLOCK), os.pidfd_open(zombie)
    of_reaped, of_killed = os.pidfd_open(reaped), os.pidfd_open(killed)
    again = os.dup(of_reaped)
    signal.pidfd_send_signal(of_killed, signal.SIGTERM)
    assert os.waitpid(reaped, 0)[1] == 7 << 8
    assert os.waitpid(killed, 0)[1] == signal.SIGTERM
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    threads = Threads() if is_there() else None
    codes = [exit_code(of_reaped), exit_code(of_killed)]
    ready()
    wait_for_go()
    assert not has_ended(itself)
    assert not has_ended(of_alive)
    assert all(map(has_ended, (of_zombie, of_reaped, of_killed)))
    assert fcntl.fcntl(of_alive, fcntl.F_GETFL) & os.O_NONBLOCK
    assert [exit_code(of_reaped), exit_code(of_killed)] == codes
    assert os.fstat(of_reaped).st_ino == os.fstat(again).st_ino != os.fstat(of_killed).st_ino
    found = os.waitid(os.P_PIDFD, of_zombie, os.WEXITED)
    assert found is not None
    assert (found.si_pid, found.si_status) == (zombie, 3)
    signal.pidfd_send_signal(of_alive, signal.SIGTERM)
    assert os.waitpid(alive, 0) == (alive, signal.SIGTERM)
    try:
        signal.pidfd_send_signal(of_reaped, 0)
        raise AssertionError('a signal to a dead process')
    except ProcessLookupError:
        pass
    signal.pidfd_send_signal(itself, 0)
    if threads is not None:
        threads.check()


main()
