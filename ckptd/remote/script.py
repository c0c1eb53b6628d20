# SPDX-License-Identifier: LGPL-2.1-or-later
"""A sequence of calls for one task, split into as many batches as its arena requires."""

import errno
import os
from collections.abc import Iterable
from typing import NamedTuple, cast

from ckptd.errors import CkptError
from ckptd.remote.batch import Batch, errno_of
from ckptd.remote.interleave import Steps, finish
from ckptd.remote.stub import Stub


class _Note(NamedTuple):
    """Data about a call, see Script.call."""
    about: str = ''
    expect: int | None = None
    accept: int = 0


_NO_NOTE = _Note()


class Script:
    """A sequence of calls. `call` collects them, `run` lets the task execute them. An error names the call and, if
    given, `about`."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._batches = [Batch()]
        self._notes: list[dict[int, _Note]] = [{}]

    def call(self, name: str, *arguments: int | bytes, about: str = '', expect: int | None = None,
             accept: int = 0) -> None:
        """Add a system call. Bytes become a buffer of the task, and the argument is its address. expect: the value that
        it must return; without it any result but an error is accepted. accept: an errno that is no failure."""
        buffers = [len(one) + 8 for one in arguments if isinstance(one, bytes)]
        self._make_room(sum(buffers))
        batch = self._batches[-1]
        if buffers:
            row = batch.call(name, *[batch.buffer(len(one), one) if isinstance(one, bytes) else one
                                     for one in arguments])
        else:
            row = batch.call(name, *cast(tuple[int, ...], arguments))
        if about or accept or expect is not None:
            self._notes[-1][row] = _Note(about, expect, accept)

    def call_with_pointer(self, name: str, arguments: tuple[int, ...], position: int, content: bytes,
                          at: Iterable[int], target: bytes, *, about: str = '', expect: int | None = None) -> None:
        """Add a call whose argument number `position` is a buffer of `content`. The eight bytes at each of the places
        `at` are the address of another buffer, `target`."""
        self._make_room(len(content) + len(target) + 16)
        batch = self._batches[-1]
        outer, inner = batch.buffer(len(content), content), batch.buffer(len(target), target)
        for place in at:
            batch.pointer(outer.offset + place, inner)
        row = batch.call(name, *arguments[:position], outer, *arguments[position:])
        self._notes[-1][row] = _Note(about, expect)

    def _make_room(self, length: int) -> None:
        if self._batches[-1].size + length + 2 * 64 > self._stub.arena.room:
            self._batches.append(Batch())
            self._notes.append({})

    def run(self) -> Steps[None]:
        """Execute the collected calls. More can be collected afterwards."""
        batches, notes = self._batches, self._notes
        self._batches, self._notes = [Batch()], [{}]
        for batch, note in zip(batches, notes, strict=True):
            if not len(batch):
                continue
            results = yield from self._stub.attempt(batch)
            # the first failure is the one that counts
            for row, value in enumerate(results.values):
                about, expect, accept = note.get(row, _NO_NOTE)
                if value < 0 and (number := errno_of(value)) not in (0, accept):
                    raise self._failed(results.names[row], number, about)
                if expect is not None and value != expect:
                    raise self._failed(results.names[row], errno.EIO, about or f'{value} and not {expect}')

    def call_now(self, name: str, *arguments: int | bytes) -> int:
        """Make one call at once. Return its result. OSError."""
        batch = Batch()
        row = batch.call(name, *[batch.buffer(len(one), one) if isinstance(one, bytes) else one for one in arguments])
        return self._stub.do(batch).value(row)

    def take(self) -> Batch:
        """Hand over what was collected, which must be one batch: whoever takes it has the task do it."""
        [batch] = self._batches
        self._batches, self._notes = [Batch()], [{}]
        return batch

    def do(self) -> None:
        finish(self.run())

    def _failed(self, name: str, number: int, about: str) -> CkptError:
        what = f' ({about})' if about else ''
        return CkptError(f'task {self._stub.tid} cannot be restored: {name}{what}: {os.strerror(number)}',
                         errno=number, task=self._stub.tid, resource=about or name)
