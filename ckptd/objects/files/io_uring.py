# SPDX-License-Identifier: LGPL-2.1-or-later
"""An io_uring (io_uring(7)): rings of requests and completions. objects/mappings/io_uring.py has its mappings.

The kernel counts requests and completions by itself. These counters must equal those that the program has in its
memory, and only requests move them: so a restart submits as many that do nothing (NOP), before any task exists. Then
the memory of the rings is put in place, with completions that the program has not read and requests that it has not
submitted.

No interface tells which requests are running. But each one that was taken makes one completion, unless the program asks
for more or for none; so equal counters mean that none is running. A ring whose counters differ is not dumped.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ckptd.errors import Busy, CkptError, Finding, ImageDamaged, NotSupported, Refused, errno_name
from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel.fdinfo import read_fdinfo
from ckptd.kernel.io_uring import (
    IORING_MAX_ENTRIES,
    IORING_REGISTER_EVENTFD,
    IORING_REGISTER_NAPI,
    IORING_REGISTER_PROBE,
    IORING_SETUP_CQE32,
    IORING_SETUP_NO_SQARRAY,
    IORING_SETUP_SQE128,
    RING_LINK,
    RingInfo,
    RingMemory,
    first_buffer_group,
    io_uring_enter,
    io_uring_params,
    is_enabled,
    make_ring,
    mapped_ring,
    parse_ring_entries,
    parse_ring_info,
    refusal_of,
)
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.support import Support

LIMIT = 10**8           # requests that a restart may submit for one ring
_LONG = 10**6           # from this number on, a restart tells how long that takes
# nanoseconds of a NOP, and of the call that submits as many as the ring has entries
_OF_NOP, _OF_CALL = 90, 1500
_FLAGS = IORING_SETUP_SQE128 | IORING_SETUP_CQE32 | IORING_SETUP_NO_SQARRAY
_MODULO = 1 << 32
_DROPPED = 10**5        # requests with a wrong index, each of which takes a call
_ALLOW = 'see the sysctls kernel.io_uring_disabled and kernel.io_uring_group, and the limits'
_CLOSE = 'let the program close it before the checkpoint'
_PLAIN = 'let the program use a plain io_uring, or none: many have a setting for that'


@layout
class IoUring(Struct):
    """An io_uring.

    inode: of its file, by which mappings know it. flags: IORING_SETUP_*, those that change the layout. sq_head,
    cq_tail: counters of the kernel. dropped: of the requests, those that had a wrong index. completions_at, indices_at:
    places in the memory of the rings, as the kernel chose them. rings, requests: the memory.
    """
    inode: U64
    sq_entries: U32
    cq_entries: U32
    flags: U32
    sq_head: U32
    cq_tail: U32
    dropped: U32
    completions_at: U32
    indices_at: U32
    rings: Extent
    requests: Extent


class IoUringKind(Kind[IoUring], tag='io_uring'):
    support = Support('io_uring, with completions that are not read yet',
                      refused='requests that run; SQPOLL, IOPOLL, SINGLE_ISSUER, NO_MMAP, R_DISABLED; registered '
                              'files, buffers, eventfds, personalities, restrictions; provided buffers; a restart '
                              f'after more than {LIMIT:,} requests',
                      user='kernel.io_uring_disabled must allow it')

    def matches(self, file: OpenFile) -> bool:
        return file.link == RING_LINK and not file.is_path

    def findings(self, file: OpenFile) -> list[Finding]:
        info = parse_ring_info(file.info.fields)
        shown = [what for is_so, what in (
            (info.has_thread, 'a thread of the kernel that takes its requests (IORING_SETUP_SQPOLL)'),
            (info.files, 'registered files'), (info.buffers, 'registered buffers'),
            (info.has_personalities, 'registered personalities'), (info.has_napi, 'busy polling (NAPI)')) if is_so]
        try:
            found = [finding('EOPNOTSUPP', f'an io_uring with {what} cannot be dumped', _PLAIN)
                     for what in shown or _hidden(file, info)]
        except NotSupported as error:
            return [finding('EPERM', error.message, error.hint)]
        if max(info.sq_head, info.cq_tail) > LIMIT:
            found.append(finding('EOPNOTSUPP', _too_many(max(info.sq_head, info.cq_tail)), _CLOSE, 'unrestorable'))
        return found

    def dump(self, file: OpenFile, content: Content) -> IoUring:
        info = parse_ring_info(read_fdinfo(file.tid, file.fd).fields)
        with file.duplicate() as fd:
            # the first words of the rings are at the same places in all layouts
            with _like(info, 0) as (_, params), mapped_ring(fd, params) as memory:
                _require_idle(file, info, memory)
                flags = _flags(file, memory)
            with _like(info, flags) as (_, params), mapped_ring(fd, params) as memory:
                return IoUring(file.stat.st_ino, info.sq_entries, info.cq_entries, flags, info.sq_head, info.cq_tail,
                               memory.sq_dropped, params.cq_off.cqes, params.sq_off.array,
                               content.add([bytes(memory.rings)]), content.add([bytes(memory.sqes)]))

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: IoUring, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        count = max(record.sq_head, record.cq_tail)
        if count > LIMIT:
            return [finding('EOPNOTSUPP', _too_many(count), 'checkpoint it sooner after the start of the program')]
        try:
            with lookup.as_user():
                fd, _ = make_ring(1, 1, 0)
            os.close(fd)
        except OSError as error:
            return [finding(errno_name(error.errno or errno.ENOSYS),
                            f'an io_uring cannot be made here: {error.strerror}', _ALLOW)]
        if count < _LONG:
            return []
        return [finding('EINPROGRESS', f'an io_uring has done {count:,} requests: the restart submits as many that do '
                        f'nothing, which takes about {_seconds(record):.1f} s', 'wait for it', 'warning')]

    def create(self, record: IoUring, saved: SavedFile, ctx: RestoreContext) -> int:
        fd = os.dup(ctx.once(('io_uring', record.inode), lambda: _make(record, ctx)))
        os.set_blocking(fd, not saved.flags & os.O_NONBLOCK)
        return fd


# ---------------------------------------------------------------- dump

@contextmanager
def _like(info: RingInfo, flags: int) -> Iterator[tuple[int, io_uring_params]]:
    """Make a ring of the same form, to learn its layout and what this kernel answers."""
    try:
        fd, params = make_ring(info.sq_entries, info.cq_entries, flags)
    except OSError as error:
        raise NotSupported(f'an io_uring cannot be made here: {error.strerror}', errno=error.errno, resource='io_uring',
                           hint=_ALLOW) from error
    try:
        yield fd, params
    finally:
        os.close(fd)


def _hidden(file: OpenFile, info: RingInfo) -> Iterator[str]:
    """Yield features of a ring that fdinfo does not show. The kernel's answers are compared with those for a ring of
    ours, which has none."""
    with file.duplicate() as fd, _like(info, 0) as (own, params):
        usual = {code: refusal_of(own, code)
                 for code in (IORING_REGISTER_EVENTFD, IORING_REGISTER_PROBE, IORING_REGISTER_NAPI)}
        if (answer := refusal_of(fd, IORING_REGISTER_PROBE)) != usual[IORING_REGISTER_PROBE]:
            yield {errno.EEXIST: 'one thread that may use it (IORING_SETUP_SINGLE_ISSUER)',
                   errno.EACCES: 'registered restrictions'}.get(answer, f'an unknown feature ({os.strerror(answer)})')
            return
        if not is_enabled(fd):
            yield 'requests disabled (IORING_SETUP_R_DISABLED)'
        if refusal_of(fd, IORING_REGISTER_EVENTFD) != usual[IORING_REGISTER_EVENTFD]:
            yield 'a registered eventfd'
        if refusal_of(fd, IORING_REGISTER_NAPI) != usual[IORING_REGISTER_NAPI]:
            yield 'busy polling of devices (IORING_SETUP_IOPOLL)'
        if first_buffer_group(own, 1) < 0 and (group := first_buffer_group(fd)) >= 0:
            yield f'provided buffers (group {group})'
        try:
            with mapped_ring(fd, params):
                pass
        except OSError:
            yield 'memory of the program (IORING_SETUP_NO_MMAP)'


def _flags(file: OpenFile, memory: RingMemory) -> int:
    """Return the flags of a ring that change its layout. fdinfo shows them by the form of its lines about requests and
    completions; if there are none, the program's words say for a moment that there is one of each."""
    with ExitStack() as stack:
        if memory.sq_tail == memory.sq_head:
            stack.callback(setattr, memory, 'sq_tail', memory.sq_tail)
            memory.sq_tail = memory.sq_head + 1
        if memory.cq_tail == memory.cq_head:
            stack.callback(setattr, memory, 'cq_head', memory.cq_head)
            memory.cq_head = memory.cq_tail - 1
        requests, completions = parse_ring_entries(read_fdinfo(file.tid, file.fd).fields)
    return (0 if requests else IORING_SETUP_NO_SQARRAY) \
        | (IORING_SETUP_SQE128 if any(' e0:' in line for line in requests) else 0) \
        | (IORING_SETUP_CQE32 if any(' extra1:' in line for line in completions) else 0)


def _require_idle(file: OpenFile, info: RingInfo, memory: RingMemory) -> None:
    """Check that no request is running. Busy."""
    running = (info.sq_head - memory.sq_dropped - info.cq_tail) % _MODULO
    if info.overflowed:
        raise _busy(file, f'{info.overflowed} completions for which the ring has no room')
    if info.polls or 0 < running < _MODULO // 2:
        raise _busy(file, f'{max(info.polls, running if running < _MODULO // 2 else 0)} requests that are running')
    if running:
        raise Refused(f'process {file.pid}: fd {file.fd}: an io_uring with requests that have more than one '
                      'completion: it cannot be told what is running', errno=errno.EOPNOTSUPP, task=file.pid,
                      resource=f'fd {file.fd}', hint=_PLAIN)


def _busy(file: OpenFile, what: str) -> Busy:
    return Busy(f'process {file.pid}: fd {file.fd}: an io_uring has {what}', task=file.pid, resource=f'fd {file.fd}',
                hint='try again; a request that has no completion (IOSQE_CQE_SKIP_SUCCESS) counts as running')


# ---------------------------------------------------------------- restart

def _too_many(count: int) -> str:
    return (f'an io_uring has done {count:,} requests: a restart has to submit as many, and does so for {LIMIT:,} at '
            'most')


def _seconds(record: IoUring) -> float:
    calls = record.sq_head / max(record.sq_entries, 1)
    return (record.sq_head * _OF_NOP + calls * _OF_CALL) / 1e9


def _make(record: IoUring, ctx: RestoreContext) -> int:
    """Make a ring with its counters and its memory."""
    _check(record)
    with ctx.as_user():
        try:
            fd, params = make_ring(record.sq_entries, record.cq_entries, record.flags)
        except OSError as error:
            raise CkptError(f'an io_uring of {record.sq_entries} entries cannot be made: {error.strerror}',
                            errno=error.errno, resource='io_uring') from error
    try:
        if (params.cq_off.cqes, params.sq_off.array) != (record.completions_at, record.indices_at):
            raise NotSupported('this kernel has another layout of the memory of an io_uring', resource='io_uring',
                               hint='restore it on the kernel that it was dumped on')
        with mapped_ring(fd, params) as memory:
            _advance(fd, record, memory)
            for extent, place in ((record.rings, memory.rings), (record.requests, memory.sqes)):
                if extent.length != len(place):
                    raise _damaged(record, f'{extent.length} bytes of memory in place of {len(place)}')
                place[:] = ctx.pread(extent, extent.length, 0)
            if (memory.sq_head, memory.cq_tail) != (record.sq_head, record.cq_tail):
                raise _damaged(record, 'counters that its memory does not have')
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(record: IoUring) -> None:
    for entries in (record.sq_entries, record.cq_entries):
        if not 0 < entries <= 2 * IORING_MAX_ENTRIES or entries & entries - 1:
            raise _damaged(record, f'{entries} entries')
    if record.flags & ~_FLAGS:
        raise _damaged(record, f'flags {record.flags:#x}')
    if record.cq_tail + record.dropped != record.sq_head or record.sq_head > LIMIT or record.dropped > _DROPPED:
        raise _damaged(record, f'{record.sq_head} requests, {record.dropped} of them dropped, and {record.cq_tail} '
                       'completions')
    if record.dropped and record.flags & IORING_SETUP_NO_SQARRAY:
        raise _damaged(record, 'dropped requests, and no indices')


def _damaged(record: IoUring, what: str) -> ImageDamaged:
    return ImageDamaged(f'io_uring {record.inode} has {what}', resource='files.img')


def _advance(fd: int, record: IoUring, memory: RingMemory) -> None:
    """Bring the counters of a new ring to those of the image. A request of zeros is a NOP, and all requests of a new
    ring are such. One with a wrong index is dropped, and ends a call."""
    tail = 0
    while tail < record.cq_tail:
        count = min(record.cq_tail - tail, record.sq_entries)
        tail += count
        memory.sq_tail = tail
        if (done := io_uring_enter(fd, count)) != count:
            raise CkptError(f'an io_uring took {done} of {count} requests that do nothing', resource='io_uring')
        memory.cq_head = tail
    if record.dropped:
        memory.set_indices(record.sq_entries, _MODULO - 1)
        for _ in range(record.dropped):
            tail += 1
            memory.sq_tail = tail
            io_uring_enter(fd, 1)
