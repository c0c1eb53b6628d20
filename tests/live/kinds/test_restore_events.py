# SPDX-License-Identifier: LGPL-2.1-or-later
"""eventfds, epolls, timerfds and signalfds: what they hold, what they watch, what was missed meanwhile."""

import ctypes
import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from ckptd.errors import CkptError, NotSupported
from ckptd.image.records import SavedFile
from ckptd.kernel import timerfd
from ckptd.kernel.epoll import EpollTarget, parse_target
from ckptd.kernel.fdinfo import list_fds
from ckptd.kernel.timerfd import Setting, timerfd_create, timerfd_gettime, timerfd_settime
from ckptd.objects.files.base import OpenFile, read_open_file
from ckptd.objects.files.epoll import Epoll, EpollKind, Watch
from ckptd.objects.files.eventfd import Eventfd, EventfdKind
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.timerfd import Timerfd
from tests.lib.brood import Brood, libc
from tests.live.kinds.conftest import Bulk, Restart, decoded, kind_of, saved_of
from tests.live.kinds.test_files import Opened

Start = Callable[..., Restart]
SECOND = 10**9


# ---------------------------------------------------------------- eventfd

COUNTERS = {'zero': 0, 'one': 1, 'beyond 32 bits': 1 << 40, 'full': (1 << 64) - 2}


@pytest.mark.parametrize('count', COUNTERS.values(), ids=COUNTERS)
def test_counter(opened: Opened, bulk: Bulk, restart: Start, count: int) -> None:
    def work() -> int:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        os.eventfd_write(fd, count)
        return fd
    file = opened(work)
    saved = saved_of(file, bulk)
    assert decoded(saved) == Eventfd(count, 0)
    job = restart()
    assert job.obstacles(saved) == []
    fd = job.whole(saved)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) == saved.flags
    if count:
        assert os.eventfd_read(fd) == count
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)


def test_semaphore(opened: Opened, bulk: Bulk, restart: Start) -> None:
    file = opened(lambda: os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK))
    if kind_of(file).findings(file):
        pytest.skip('this kernel does not tell a semaphore')
    fd = restart().whole(saved_of(file, bulk))
    assert [os.eventfd_read(fd) for _ in range(3)] == [1, 1, 1]


def test_kernel_that_does_not_tell_semaphores(opened: Opened) -> None:
    file = opened(lambda: os.eventfd(7))
    fields = {key: rows for key, rows in file.info.fields.items() if key != 'eventfd-semaphore'}
    older = OpenFile(file.pid, file.tid, file.fd, file.link, file.stat, file.info._replace(fields=fields))
    assert [reason.severity for reason in EventfdKind(JobTables()).findings(older)] == ['warning']
    assert EventfdKind(JobTables()).dump(older, Bulk()) == Eventfd(7, 0)


# ---------------------------------------------------------------- epoll

class Poll:
    """An epoll instance of the test process, by number, and what it says is ready."""

    def __init__(self, fd: int) -> None:
        self._poll = select.epoll.fromfd(os.dup(fd))

    def ready(self) -> dict[int, int]:
        return dict(self._poll.poll(0))

    def close(self) -> None:
        self._poll.close()


@pytest.fixture
def polls() -> Iterator[Callable[[int], Poll]]:
    made: list[Poll] = []

    def make(fd: int) -> Poll:
        made.append(Poll(fd))
        return made[-1]
    yield make
    for one in made:
        one.close()


def watch(epoll: int, fd: int, events: int, data: int | None = None) -> None:
    event = struct.pack('=IQ', events, fd if data is None else data)
    assert libc.epoll_ctl(epoll, 1, fd, event) == 0


def bring_back(job: Restart, saved: dict[int, SavedFile]) -> None:
    """All files at the numbers that they had; then what needs the others."""
    for number, one in saved.items():
        job.restore(one, at=number)
    for number, one in saved.items():
        job.finish(one, number)
    for number, one in saved.items():
        job.watch(one, number)


def save_own(fds: list[int], bulk: Bulk, job: Restart) -> dict[int, SavedFile]:
    """Records of fds of the test process, which is the restored one, too: the new files take the place of these."""
    assert job.vpid == os.getpid()
    files = {fd: (number, read_open_file(os.getpid(), fd)) for number, fd in enumerate(fds, 1)}
    bulk.known = {(os.getpid(), fd): one for fd, one in files.items()}
    return {fd: saved_of(file, bulk, number) for fd, (number, file) in files.items()}


def test_epoll(bulk: Bulk, restart: Start, polls: Callable[[int], Poll]) -> None:
    epoll, event, idle, (read, write) = libc.epoll_create1(0), os.eventfd(1), os.eventfd(0), os.pipe()
    watch(epoll, event, select.EPOLLIN)
    watch(epoll, idle, select.EPOLLIN)
    watch(epoll, read, select.EPOLLIN | select.EPOLLET, 1 << 50)
    watch(epoll, write, select.EPOLLOUT)
    before = read_open_file(os.getpid(), epoll).info.fields['tfd']
    os.write(write, b'x')
    job = restart()
    saved = save_own([epoll, event, idle, read, write], bulk, job)
    bring_back(job, saved)
    job.close_shared()
    after = read_open_file(os.getpid(), epoll).info.fields['tfd']
    assert sorted(map(parse_target, after)) == sorted(map(parse_target, before))
    assert polls(epoll).ready() == {event: select.EPOLLIN, write: select.EPOLLOUT,
                                    ctypes.c_int(1 << 50).value: select.EPOLLIN}
    os.eventfd_read(event)
    assert event not in polls(epoll).ready()
    os.eventfd_write(idle, 1)
    assert polls(epoll).ready()[idle] == select.EPOLLIN


def test_epoll_in_an_epoll(bulk: Bulk, restart: Start, polls: Callable[[int], Poll]) -> None:
    outer, inner, event = libc.epoll_create1(0), libc.epoll_create1(0), os.eventfd(1)
    watch(inner, event, select.EPOLLIN)
    watch(outer, inner, select.EPOLLIN)
    job = restart()
    bring_back(job, save_own([outer, inner, event], bulk, job))
    assert polls(outer).ready() == {inner: select.EPOLLIN}


def test_disarmed_one_shot_stays_disarmed(bulk: Bulk, restart: Start, polls: Callable[[int], Poll]) -> None:
    epoll, event = libc.epoll_create1(0), os.eventfd(1)
    watch(epoll, event, select.EPOLLIN | select.EPOLLONESHOT)
    assert polls(epoll).ready() == {event: select.EPOLLIN}
    job = restart()
    # the duplicate that asked for what is ready holds the old instance, and is no part of the new one
    bring_back(job, save_own([epoll, event], bulk, job))
    poll = polls(epoll)
    assert poll.ready() == {}
    assert libc.epoll_ctl(epoll, 3, event, struct.pack('=IQ', select.EPOLLIN, event)) == 0       # EPOLL_CTL_MOD
    assert poll.ready() == {event: select.EPOLLIN}


def known(pid: int) -> dict[tuple[int, int], tuple[int, OpenFile]]:
    """All open files of a child. It may just be closing one."""
    found = {}
    for fd in list_fds(pid):
        with suppress(FileNotFoundError):
            found[pid, fd] = fd, read_open_file(pid, fd)
    return found


def closed_but_watched() -> int:
    """The file is kept open by another number, so the epoll still watches it."""
    epoll, event = libc.epoll_create1(0), os.eventfd(1)
    watch(epoll, event, select.EPOLLIN)
    os.dup(event)
    os.close(event)
    return epoll


def replaced_but_watched() -> int:
    epoll, event = libc.epoll_create1(0), os.eventfd(1)
    watch(epoll, event, select.EPOLLIN)
    os.dup(event)
    os.dup2(os.eventfd(0), event)
    return epoll


@pytest.mark.parametrize('work', [closed_but_watched, replaced_but_watched])
def test_file_that_the_tree_does_not_have(opened: Opened, bulk: Bulk, work: Callable[[], int]) -> None:
    file = opened(work)
    assert [(reason.severity, reason.errno) for reason in kind_of(file).findings(file)] == [('warning', 'EBADF')]
    with pytest.raises(NotSupported, match='no process of the tree has open') as caught:
        kind_of(file).dump(file, bulk)
    assert (caught.value.task, caught.value.resource) == (file.pid, f'fd {file.fd}')


@pytest.mark.parametrize('work', [closed_but_watched, replaced_but_watched])
def test_file_that_the_tree_has_under_another_number(opened: Opened, bulk: Bulk, work: Callable[[], int]) -> None:
    file = opened(work)
    kind = EpollKind(tables := JobTables())
    tables.table_owners = (file.tid,)
    assert kind.findings(file) == []
    bulk.known = known(file.pid)
    [found] = kind.dump(file, bulk).watches
    [row] = file.info.fields['tfd']
    assert (found.fd, found.data) == (parse_target(row).tfd, parse_target(row).data)
    assert found.file_id not in (found.fd, file.fd)


def test_number_that_two_files_had(bulk: Bulk) -> None:
    """The epoll has two entries of one number; each is told from the other."""
    def work() -> list[int]:
        epoll, event = libc.epoll_create1(0), os.eventfd(1)
        watch(epoll, event, select.EPOLLIN, 1)
        kept = os.dup(event)
        os.dup2(os.eventfd(0), event)
        watch(epoll, event, select.EPOLLIN, 2)
        return [epoll, event, kept]
    with Brood() as own:
        pid, (epoll, event, kept) = own.ask(work)
        bulk.known = known(pid)
        file = read_open_file(pid, epoll)
        found: Any = kind_of(file).dump(file, bulk)
        assert {one.data: one.file_id for one in found.watches} == {1: kept, 2: event}
        assert {one.fd for one in found.watches} == {event}


@pytest.mark.parametrize('ready', [False, True])
def test_edge_that_was_reported(bulk: Bulk, restart: Start, polls: Callable[[int], Poll], ready: bool) -> None:
    """It is not reported again, unless the epoll has something else to report at the checkpoint."""
    epoll, event, level = libc.epoll_create1(0), os.eventfd(1), os.eventfd(int(ready))
    watch(epoll, event, select.EPOLLIN | select.EPOLLET)
    watch(epoll, level, select.EPOLLIN)
    polls(epoll).ready()
    job = restart()
    bring_back(job, save_own([epoll, event, level], bulk, job))
    assert polls(epoll).ready() == ({event: select.EPOLLIN, level: select.EPOLLIN} if ready else {})
    os.eventfd_write(event, 1)
    assert polls(epoll).ready()[event] == select.EPOLLIN


def test_edge_of_an_event_that_is_new(bulk: Bulk, restart: Start, polls: Callable[[int], Poll]) -> None:
    """Between checkpoint and restart the file has got another event."""
    epoll, (read, write) = libc.epoll_create1(0), os.pipe()
    watch(epoll, read, select.EPOLLIN | select.EPOLLET)
    os.write(write, b'x')
    assert polls(epoll).ready() == {read: select.EPOLLIN}
    job = restart()
    saved = save_own([epoll, read, write], bulk, job)
    assert [one.reported for one in decoded(saved[epoll]).watches] == [select.EPOLLIN]
    for number, one in saved.items():
        job.restore(one, at=number)
        job.finish(one, number)
    job.let_go(write)
    job.close_shared()
    job.watch(saved[epoll], epoll)
    assert polls(epoll).ready() == {read: select.EPOLLIN | select.EPOLLHUP}


@pytest.mark.parametrize('record', [Watch(2, 1 << 30, 1, 0, 0), Watch(1, 9, 1, 0, 0)])
def test_watch_that_cannot_be_added(bulk: Bulk, restart: Start, record: Watch) -> None:
    """A number that no fd can have, and an epoll that watches itself."""
    epoll, event = libc.epoll_create1(0), os.eventfd(1)
    job = restart()
    saved = save_own([epoll, event], bulk, job)
    job.restore(saved[event], at=event)
    fd = job.restore(saved[epoll], at=epoll)
    before = list_fds(os.getpid())
    with pytest.raises(CkptError, match=f'an epoll instance cannot watch fd {record.fd} again'):
        job.watch(replace(saved[epoll], data=Epoll((record,)).encode()), fd)
    assert list_fds(os.getpid()) == before


def test_row_of_fdinfo() -> None:
    assert parse_target('       5 events: 80000019 data:     ffffffffffff  pos:0 ino:e6f sdev:d') == EpollTarget(
        5, 0x80000019, (1 << 48) - 1)


# ---------------------------------------------------------------- timerfd

def timer(clock: int, setting: Setting, flags: int = 0) -> Callable[[], int]:
    def work() -> int:
        fd = timerfd_create(clock, timerfd.TFD_NONBLOCK)
        timerfd_settime(fd, flags, setting)
        return fd
    return work


def test_timer_goes_on_with_the_time_left(opened: Opened, bulk: Bulk, restart: Start) -> None:
    saved = saved_of(opened(timer(time.CLOCK_MONOTONIC, Setting(7 * SECOND, 1000 * SECOND))), bulk)
    record = decoded(saved)
    assert isinstance(record, Timerfd)
    fd = restart().whole(saved)
    interval, value = timerfd_gettime(fd)
    assert interval == 7 * SECOND
    assert record.value - 100 * SECOND < value <= record.value <= 1000 * SECOND
    assert fcntl.fcntl(fd, fcntl.F_GETFL) == saved.flags
    with pytest.raises(BlockingIOError):
        os.read(fd, 8)


def test_timer_of_a_time_of_day(opened: Opened, bulk: Bulk, restart: Start) -> None:
    at = time.time_ns() + 1000 * SECOND
    saved = saved_of(opened(timer(time.CLOCK_REALTIME, Setting(0, at), timerfd.TFD_TIMER_ABSTIME)), bulk)
    record = decoded(saved)
    assert abs(record.now + record.value - at) < SECOND
    late = Timerfd(record.clock, record.flags, 0, 0, record.value, record.now - 2000 * SECOND)
    fd = restart().whole(saved)
    assert abs(time.time_ns() + timerfd_gettime(fd).value - at) < SECOND
    missed = restart().whole(SavedFile(1, 'timerfd', saved.flags, 0, 0, 0, 0, 0, saved.link, late.encode()))
    assert select.select([missed], [], [], 10)[0] == [missed]
    assert os.read(missed, 8) == struct.pack('=Q', 1)


def test_timer_that_is_not_armed(opened: Opened, bulk: Bulk, restart: Start) -> None:
    fd = restart().whole(saved_of(opened(lambda: timerfd_create(time.CLOCK_BOOTTIME, 0)), bulk))
    assert timerfd_gettime(fd) == (0, 0)


def test_expirations_that_were_not_read(opened: Opened, bulk: Bulk, restart: Start) -> None:
    def work(setting: Setting) -> Callable[[], int]:
        def expire() -> int:
            fd = timer(time.CLOCK_MONOTONIC, setting)()
            select.select([fd], [], [])
            return fd
        return expire
    once = restart().whole(saved_of(opened(work(Setting(0, 1))), bulk))
    assert os.read(once, 8) == struct.pack('=Q', 1)
    assert timerfd_gettime(once) == (0, 0)
    file = opened(work(Setting(1000 * SECOND, 1)))
    saved = saved_of(file, bulk)
    assert decoded(saved).value > 0         # by fdinfo alone it would never go off again
    again = restart().whole(saved)
    assert os.read(again, 8) == struct.pack('=Q', 1)
    assert 0 < timerfd_gettime(again).value <= 1000 * SECOND


# ---------------------------------------------------------------- signalfd

def test_signalfd(opened: Opened, bulk: Bulk, restart: Start) -> None:
    def work() -> int:
        mask = ctypes.create_string_buffer((1 << signal.SIGUSR1 - 1 | 1 << 63).to_bytes(8, 'little'), 128)
        return int(libc.signalfd(-1, mask, os.O_NONBLOCK))
    file = opened(work)
    saved = saved_of(file, bulk)
    fd = restart().whole(saved)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) == saved.flags
    assert read_open_file(os.getpid(), fd).info.fields['sigmask'] == file.info.fields['sigmask']
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert os.read(fd, 128)[:4] == struct.pack('=I', signal.SIGUSR1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
