# SPDX-License-Identifier: LGPL-2.1-or-later
"""An epoll instance: the open files that it watches, and the events (epoll(7)).

It watches descriptions, and knows each by the fd that it had in the table of the task that added it. That fd may be
closed since, while another one, perhaps in another process, keeps the file open: kcmp(2) finds it. A restart adds each
file under the number that it had, in a table of fds of its own.

No call shows the list of files that are ready. If nothing is ready in an instance, then every edge (EPOLLET) of a file
that is ready has been reported, and a restart takes note of it again. Otherwise such an edge is reported once more, as
an edge must never be lost.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ckptd.errors import CkptError, Finding, NotSupported
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.creds import CAP_BLOCK_SUSPEND
from ckptd.kernel.epoll import (
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    EPOLL_CTL_MOD,
    EPOLLET,
    EPOLLONESHOT,
    EPOLLWAKEUP,
    POLL_BITS,
    PRIVATE_BITS,
    BusyPoll,
    EpollTarget,
    epoll_create1,
    epoll_ctl,
    parse_target,
    read_busy_poll,
    ready_events,
    set_busy_poll,
    take_ready,
)
from ckptd.kernel.fdinfo import list_fds
from ckptd.kernel.kcmp import EQUAL, kcmp_epoll
from ckptd.kernel.own_files import at_number, with_own_files
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.eventfd import EVENTFD_LINK
from ckptd.objects.support import Support

_LINK = 'anon_inode:[eventpoll]'
_HINT = ('the program closed it, and a process outside of the tree keeps it open: let it be removed from the epoll '
         '(EPOLL_CTL_DEL) first, or checkpoint that process, too')


@layout
class Watch(Struct):
    """A watched file. fd: the number that it had in the table of the task that added it. events: EPOLL*; for a disarmed
    EPOLLONESHOT without the events to wait for. reported: for EPOLLET, the events that the file has and whose edge was
    reported."""
    file_id: U32
    fd: U32
    events: U32
    data: U64
    reported: U32


@layout
class Epoll(Struct):
    """An instance. usecs, budget, prefer: see kernel.epoll.BusyPoll."""
    watches: tuple[Watch, ...]
    usecs: U32 = 0
    budget: U32 = 0
    prefer: U8 = 0


class _Target(NamedTuple):
    """A watched file and its index among those of equal fd, as kcmp(2) needs it."""
    of: EpollTarget
    nth: int


class EpollKind(Kind[Epoll], tag='epoll', alike=False, last=True):
    support = Support('epoll instances', refused='an entry of a file that only processes outside of the tree have open',
                      warned='an edge that was reported may be reported again, if the instance has others to report')

    def matches(self, file: OpenFile) -> bool:
        return file.link == _LINK and not file.is_path

    def findings(self, file: OpenFile) -> list[Finding]:
        # the file may be in flight, which is known only later; if not, it is refused
        return [finding('EBADF', f'an epoll instance watches a file that was fd {target.of.tfd} and is not found',
                        f'it cannot be dumped if no process of the tree has it open: {_HINT}', 'warning')
                for target in _targets(file) if not self._is_known(file, target)]

    def _is_known(self, file: OpenFile, target: _Target) -> bool:
        if _is_watched(file, target, file.tid, target.of.tfd):
            return True
        return any(_is_watched(file, target, tid, fd) for tid in self._tables.table_owners for fd in list_fds(tid))

    def dump(self, file: OpenFile, content: Content) -> Epoll:
        watches = [self._watch(file, target, content) for target in _targets(file)]
        with file.duplicate() as fd:
            # asked last: what has become ready meanwhile, by a process outside of the tree, was not reported
            if ready_events(fd, POLL_BITS):
                watches = [replace(watch, reported=0) for watch in watches]
            return Epoll(tuple(watches), *read_busy_poll(fd))

    def _watch(self, file: OpenFile, target: _Target, content: Content) -> Watch:
        for tid, _ in ((file.tid, file.fd), *file.holders):
            known = content.found(tid, target.of.tfd)
            if known and _is_watched(file, target, tid, target.of.tfd):
                return _record(target.of, *known)
        for file_id, other in content.every():
            if _is_watched(file, target, other.tid, other.fd):
                return _record(target.of, file_id, other)
        raise NotSupported(f'task {file.pid}: fd {file.fd}: an epoll instance watches a file that was fd '
                           f'{target.of.tfd} and that no process of the tree has open', task=file.pid,
                           resource=f'fd {file.fd}', hint=_HINT)

    # ------------------------------------------------------------ restart

    def references(self, record: Epoll) -> Iterator[int]:
        return (watch.file_id for watch in record.watches)

    def restart_findings(self, record: Epoll, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if not any(watch.events & EPOLLWAKEUP for watch in record.watches) or lookup.capable(CAP_BLOCK_SUSPEND):
            return []
        return [finding('EPERM', 'an epoll instance keeps the machine awake for its events (EPOLLWAKEUP), which needs '
                        'CAP_BLOCK_SUSPEND', 'restore it as root, or it does not keep the machine awake', 'warning')]

    def create(self, record: Epoll, saved: SavedFile, ctx: RestoreContext) -> int:
        fd = epoll_create1(EPOLL_CLOEXEC)
        busy_poll = BusyPoll(record.usecs, record.budget, record.prefer)
        try:
            if any(busy_poll):
                set_busy_poll(fd, busy_poll)
        except OSError as error:
            os.close(fd)
            raise CkptError(f'{saved.link}: its parameters for busy polling cannot be set again: {error.strerror}',
                            errno=error.errno, resource=saved.link,
                            hint='restore it as root, on a kernel with CONFIG_NET_RX_BUSY_POLL') from error
        return fd

    def watch(self, record: Epoll, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        """Add the files. Those whose events the program has taken note of come first, while only they are there to be
        reported."""
        if record.watches:
            with_own_files(_Adding(record, saved, fd, ctx).add_all)


class _Adding:
    """The addition of files to an instance, by a thread with fds of its own."""

    def __init__(self, record: Epoll, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        self._watches, self._saved, self._fd = record.watches, saved, fd
        self._files = {watch.file_id: ctx.fd_of(watch.file_id) for watch in record.watches}

    def add_all(self) -> None:
        self._epoll = os.dup(self._fd)
        is_spent = [self._is_spent(watch) for watch in self._watches]
        spent = [watch for watch, first in zip(self._watches, is_spent, strict=True) if first]
        for watch in spent:
            # any event of a disarmed entry disarms it again
            self._control(EPOLL_CTL_ADD, watch, watch.events if watch.reported else watch.events | POLL_BITS)
        if spent:
            take_ready(self._epoll, len(spent))
        for watch in spent:
            if watch.reported and self._has_news(watch):    # by a process outside of the tree
                self._control(EPOLL_CTL_MOD, watch, watch.events)
        for watch, first in zip(self._watches, is_spent, strict=True):
            if not first:
                self._control(EPOLL_CTL_ADD, watch, watch.events)

    def _is_spent(self, watch: Watch) -> bool:
        """Whether the program has taken note of what the file has to report: the entry is a disarmed EPOLLONESHOT, or
        the edge of the events that the file has now was reported."""
        if watch.events & EPOLLONESHOT and not watch.events & ~PRIVATE_BITS:
            return bool(ready_events(self._files[watch.file_id], POLL_BITS))
        return bool(watch.reported) and not self._has_news(watch)

    def _has_news(self, watch: Watch) -> bool:
        return bool(ready_events(self._files[watch.file_id], watch.events) & ~watch.reported)

    def _control(self, op: int, watch: Watch, events: int) -> None:
        if self._epoll == watch.fd:     # make room for that number
            self._epoll = os.dup(self._epoll)
        try:
            with at_number(self._files[watch.file_id], watch.fd):
                epoll_ctl(self._epoll, op, watch.fd, events, watch.data)
        except OSError as error:
            raise CkptError(f'an epoll instance cannot watch fd {watch.fd} again: {error.strerror}', errno=error.errno,
                            resource=self._saved.link) from error


# ---------------------------------------------------------------- dump

def _targets(file: OpenFile) -> Iterator[_Target]:
    seen: Counter[int] = Counter()
    for row in file.info.fields.get('tfd', ()):
        target = parse_target(row)
        yield _Target(target, seen[target.tfd])
        seen[target.tfd] += 1


def _is_watched(file: OpenFile, target: _Target, tid: int, fd: int) -> bool:
    """Whether an fd in the table of `tid` refers to the watched file."""
    try:
        return kcmp_epoll(tid, fd, file.tid, file.fd, target.of.tfd, target.nth) == EQUAL
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOENT):
            raise
        return False


def _record(target: EpollTarget, file_id: int, watched: OpenFile) -> Watch:
    """Return the record of a watched file. For now, all events that it has are noted as reported."""
    reported = 0
    if target.events & EPOLLET and _has_steady_events(watched):
        with watched.duplicate() as fd:
            reported = ready_events(fd, target.events)
    return Watch(file_id, *target, reported)


def _has_steady_events(file: OpenFile) -> bool:
    """Whether the events of a file stay the same while the tree does not run. Those of timers do not, and those of a
    signalfd depend on the task that asks."""
    return stat.S_ISFIFO(file.stat.st_mode) or stat.S_ISSOCK(file.stat.st_mode) or file.link == EVENTFD_LINK
