# SPDX-License-Identifier: LGPL-2.1-or-later
"""An epoll instance: the open files that it watches, and the events (epoll(7)).

It watches descriptions, and knows each by the fd that it had in the table of the task that added it. The dump finds a
process that still has that fd for that file, and at the restart this process adds it again. Readiness is determined
again, so an edge-triggered watch may report an event a second time.
"""

import errno
import os
from collections import Counter
from collections.abc import Iterator

from ckptd.errors import CkptError, Finding, ImageDamaged, NotSupported
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.epoll import (
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    BusyPoll,
    EpollTarget,
    epoll_create1,
    pack_event,
    parse_target,
    read_busy_poll,
    set_busy_poll,
)
from ckptd.kernel.kcmp import EQUAL, kcmp_epoll
from ckptd.kernel.status import read_status
from ckptd.objects.files.base import Content, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.support import Support

_LINK = 'anon_inode:[eventpoll]'
_HINT = 'the program closed it while another fd keeps it open; let it be removed from the epoll (EPOLL_CTL_DEL) first'


@layout
class Watch(Struct):
    """A watched file. fd: its number in the process `vpid`, which has the epoll, too. events: EPOLL*; for a disarmed
    EPOLLONESHOT without the events to wait for."""
    vpid: U32
    fd: U32
    events: U32
    data: U64


@layout
class Epoll(Struct):
    """An instance. usecs, budget, prefer: see kernel.epoll.BusyPoll."""
    watches: tuple[Watch, ...]
    usecs: U32 = 0
    budget: U32 = 0
    prefer: U8 = 0


class EpollKind(Kind[Epoll], tag='epoll', alike=False):
    support = Support('epoll instances', refused='an entry of a file whose descriptor was closed',
                      warned='an edge that was reported may be reported again')

    def matches(self, file: OpenFile) -> bool:
        return file.link == _LINK and not file.is_path

    def findings(self, file: OpenFile) -> list[Finding]:
        # another process of the tree may have it, which is known only later; then it is refused
        return [finding('EBADF', f'an epoll instance watches a file that is no longer fd {target.tfd} here',
                        f'it cannot be dumped if no process that has it knows that file: {_HINT}', 'warning')
                for target, nth in _targets(file) if not _watches(file, file.tid, file.fd, target, nth)]

    def dump(self, file: OpenFile, content: Content) -> Epoll:
        watches = tuple(self._watch(file, target, nth) for target, nth in _targets(file))
        with file.duplicate() as fd:
            return Epoll(watches, *read_busy_poll(fd))

    def _watch(self, file: OpenFile, target: EpollTarget, nth: int) -> Watch:
        for tid, fd in ((file.tid, file.fd), *file.holders):
            if _watches(file, tid, fd, target, nth):
                return Watch(read_status(tid).ns_tgid[-1], *target)
        raise NotSupported(f'task {file.pid}: fd {file.fd}: an epoll instance watches a file that is no longer fd '
                           f'{target.tfd}', task=file.pid, resource=f'fd {file.fd}', hint=_HINT)

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

    def connect(self, record: Epoll, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        holders = ctx.holders(saved.file_id)
        if record.watches and not holders:      # the dump finds no process that knows the watched files
            raise ImageDamaged('an epoll instance that no process has watches files', resource=saved.link)
        known = dict(reversed(holders))
        for watch in record.watches:
            # of processes that share an fd table, only one is listed
            vpid = watch.vpid if watch.vpid in known else holders[0][0]
            try:
                ctx.call(vpid, 'epoll_ctl', known[vpid], EPOLL_CTL_ADD, watch.fd, pack_event(watch.events, watch.data))
            except OSError as error:
                raise CkptError(f'an epoll instance cannot watch fd {watch.fd} of process {vpid} again: '
                                f'{error.strerror}', errno=error.errno, resource=saved.link) from error


def _targets(file: OpenFile) -> Iterator[tuple[EpollTarget, int]]:
    """Yield the watched files, each with its index among those with the same fd, as kcmp(2) needs it."""
    seen: Counter[int] = Counter()
    for row in file.info.fields.get('tfd', ()):
        target = parse_target(row)
        yield target, seen[target.tfd]
        seen[target.tfd] += 1


def _watches(file: OpenFile, tid: int, epoll: int, target: EpollTarget, nth: int) -> bool:
    """Whether the fd in the table of `tid` still refers to the watched file."""
    try:
        return kcmp_epoll(tid, target.tfd, tid, epoll, target.tfd, nth) == EQUAL
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOENT):
            raise
        return False
