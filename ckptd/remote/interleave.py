# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interleave work that waits for tasks to stop: a generator yields wherever it would wait.

    def work() -> Steps[int]:
        start something
        yield                       when it continues here, it need not wait
        return result

    interleave(work(i) for i in ...)        many at a time
    finish(work())                          one by itself
"""

from collections import deque
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from typing import TypeAlias, TypeVar

T = TypeVar('T')
Steps: TypeAlias = Generator[None, None, T]

WIDTH = 32          # enough to hide a wake-up; each has a few pages of its task's memory mapped meanwhile


def finish(work: Steps[T]) -> T:
    """Do all steps. Return the result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def interleave(works: Iterable[Steps[None]], width: int = WIDTH) -> None:
    """Do all works, at most `width` at a time, started in order. The first error ends all: the others are closed and
    undo what they have begun."""
    active: deque[Steps[None]] = deque()
    try:
        for work in works:
            active.append(work)
            if len(active) == width:
                _step(active)
        while active:
            _step(active)
    finally:
        with ExitStack() as stack:
            for work in active:
                stack.callback(work.close)


def _step(active: 'deque[Steps[None]]') -> None:
    work = active.popleft()
    try:
        next(work)
    except StopIteration:
        return
    active.append(work)
