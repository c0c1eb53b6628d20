# SPDX-License-Identifier: LGPL-2.1-or-later
"""Contexts of asynchronous I/O (io_setup(2)): whether requests are running. objects/mappings/aio.py makes them again.

No interface tells how many requests of a context are running. But the kernel takes no more requests than the ring has
room for completions. So a stopped task submits requests that are done at once until none is accepted any more: fewer
than there is room for are accepted if others are running. Their completions are taken out of the ring again.

The kernel keeps a few free requests for each processor, so each processor is asked if the first answer is too low.
"""

import os
import secrets
from collections.abc import Generator, Sequence
from typing import NamedTuple

from ckptd.errors import Busy, NotSupported
from ckptd.image.grammar import Struct
from ckptd.kernel.aio import (
    EVENT_SIZE,
    HEADER_SIZE,
    IOCB_SIZE,
    RING_NAME,
    RingHeader,
    batch_size,
    empty_read,
    event_data,
    parse_ring_header,
    possible_processors,
)
from ckptd.kernel.fdinfo import list_fds
from ckptd.kernel.maps import Mapping
from ckptd.kernel.memory import Mem
from ckptd.objects.attributes.base import Attribute, DumpedTask, Scope
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Results
from ckptd.tree import Task

_AT_ONCE, _READ_AT_ONCE, _MOST_READS, _PROCESSORS_AT_ONCE = 1024, 64, 128, 32       # of what fits into a batch
_HEAD_AT = 8        # struct aio_ring


class AioContext(NamedTuple):
    """A context. problem: the reason why it cannot be dumped; empty if it can. running: requests that are running."""
    start: int
    problem: str
    running: int = 0


class AioContexts(Attribute[Struct, list[AioContext]], name='AIO contexts', scope=Scope.MM):
    support = Support('contexts of asynchronous I/O (io_setup), with completions that are not read yet',
                      refused='requests that run; a ring that a child has inherited')

    def ask_more(self, tid: int, mappings: Sequence[Mapping]) -> Generator[Batch, Results, list[AioContext]]:
        found = []
        for mapping in mappings:
            if mapping.path == RING_NAME:
                found.append((yield from _ContextProbe(tid, mapping).run()))
        return found

    def require(self, task: Task, answer: list[AioContext]) -> None:
        for one in answer:
            if one.problem:
                raise NotSupported(f'{task.comm}[{task.tid}] has a ring of asynchronous I/O at {one.start:x} '
                                   f'{one.problem}', task=task.tid, resource='AIO', phase='state',
                                   hint='let the program unmap it, or end the context with io_destroy(2)')
            if one.running:
                raise Busy(f'{task.comm}[{task.tid}] has {one.running} requests of asynchronous I/O that are running',
                           task=task.tid, resource='AIO', phase='state', hint='try again when they are done')

    def dump(self, of: DumpedTask, answer: list[AioContext]) -> None:
        return None


class _ContextProbe:
    """The look at one context, which leaves its ring as it was, at other positions."""

    def __init__(self, tid: int, mapping: Mapping) -> None:
        self._tid, self._start, self._size = tid, mapping.start, mapping.size
        self._mark = secrets.randbits(64)

    def run(self) -> Generator[Batch, Results, AioContext]:
        batch = Batch()
        call = batch.call('io_getevents', self._start, 0, 0, batch.buffer(EVENT_SIZE), 0)
        if (yield batch).values[call] < 0:
            return AioContext(self._start, 'which belongs to another process, or was moved')
        try:
            header = self._header()
        except ValueError:
            return AioContext(self._start, 'whose header was overwritten')
        processors = possible_processors()
        _, stuck = divmod(header.events - 1, batch_size(header.events, len(processors)))
        own = sorted(os.sched_getaffinity(self._tid))
        accepted = 0
        for first in (own[:1], *([processors] if len(processors) > 1 else [])):
            accepted = yield from self._fill(first, own)
            unread = self._take_out(header)
            header = self._header()
            # the remainder that is less than the kernel takes at once can never be had
            running = header.events - 1 - stuck - unread - accepted
            if not running:
                break
        return AioContext(self._start, '', running)

    def _header(self) -> RingHeader:
        with Mem(self._tid) as mem:
            return parse_ring_header(mem.read(self._start, HEADER_SIZE), self._size)

    def _fill(self, processors: Sequence[int], own: Sequence[int]) -> Generator[Batch, Results, int]:
        """Submit requests on these processors until none is accepted. Return the number of those that were."""
        header, accepted = self._header(), 0
        for first in range(0, len(processors), _PROCESSORS_AT_ONCE):
            some = processors[first:first + _PROCESSORS_AT_ONCE]
            batch, calls = self._batch(header, some, own, takes_all=not first, is_last=some[-1] == processors[-1])
            results = yield batch
            accepted += sum(max(results.values[call], 0) for call in calls)
        return accepted

    def _batch(self, header: RingHeader, processors: Sequence[int], own: Sequence[int], *, takes_all: bool,
               is_last: bool) -> tuple[Batch, list[int]]:
        """Make a batch. If the ring is empty, the completions are read by the last one, so that a program whose tracer
        dies just then finds no other completions than its own."""
        fd = next(number for number, taken in enumerate([*list_fds(self._tid), -1]) if number != taken)
        batch, calls = Batch(), []
        request = batch.buffer(IOCB_SIZE, empty_read(fd, self._mark))
        requests = batch.buffer(8 * _AT_ONCE)
        for index in range(_AT_ONCE):
            batch.pointer(requests.offset + 8 * index, request)
        batch.call('eventfd2', 0, os.O_CLOEXEC)
        for index, processor in enumerate(processors):
            self._move_to(batch, [processor])
            wanted = header.events if takes_all and not index else 2 * batch_size(header.events, 1)
            calls += [batch.call('io_submit', self._start, _AT_ONCE, requests)
                      for _ in range(-(-wanted // _AT_ONCE))]
        self._move_to(batch, own)
        batch.call('close', fd)
        if is_last and not header.unread:
            events = batch.buffer(EVENT_SIZE * _READ_AT_ONCE)
            for _ in range(min(-(-header.events // _READ_AT_ONCE), _MOST_READS)):
                batch.call('io_getevents', self._start, 0, _READ_AT_ONCE, events, 0)
        return batch, calls

    def _move_to(self, batch: Batch, processors: Sequence[int]) -> None:
        mask = sum(1 << number for number in processors)
        length = mask.bit_length() // 64 * 8 + 8
        batch.call('sched_setaffinity', 0, length, batch.buffer(length, mask.to_bytes(length, 'little')))

    def _take_out(self, before: RingHeader) -> int:
        """Take our completions out of the ring. Return the number of those that the program has not read.

        The kernel writes at the tail and beyond it, so those before it are ours to move.
        """
        with Mem(self._tid) as mem:
            ring = mem.read(self._start, self._size)
            now = parse_ring_header(ring, self._size)
            places = [(before.head + index) % now.events for index in range((now.tail - before.head) % now.events)]
            events = [ring[HEADER_SIZE + EVENT_SIZE * place:][:EVENT_SIZE] for place in places]
            kept = [event for event in events if event_data(event) != self._mark]
            if now.unread != len(kept) or before.unread:
                for place, event in zip(places[len(places) - len(kept):], kept, strict=True):
                    mem.write(self._start + HEADER_SIZE + EVENT_SIZE * place, event)
                mem.write(self._start + _HEAD_AT, ((now.tail - len(kept)) % now.events).to_bytes(4, 'little'))
        return len(kept)
