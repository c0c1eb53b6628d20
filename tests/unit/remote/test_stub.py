# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tasks that share memory share the pages of their stub."""

import pytest

from ckptd.kernel.ptrace import Tracee
from ckptd.remote.interleave import Steps, finish, interleave
from ckptd.remote.stub import Arena, Stub, Turn

ARENA = Arena.at(0x10000, 0x8000)


def work(name: str, seen: list[str]) -> Steps[None]:
    seen.append(f'{name} begins')
    yield
    seen.append(f'{name} ends')


def stubs(*turns: Turn) -> list[Stub]:
    return [Stub(Tracee(number), ARENA, turn) for number, turn in enumerate(turns, 2)]


def test_one_at_a_time_in_shared_memory() -> None:
    seen: list[str] = []
    turn = Turn()
    a, b = stubs(turn, turn)
    interleave([a.alone(work('a', seen)), b.alone(work('b', seen))])
    assert seen == ['a begins', 'a ends', 'b begins', 'b ends']


def test_many_at_a_time_otherwise() -> None:
    seen: list[str] = []
    a, b = stubs(Turn(), Turn())
    interleave([a.alone(work('a', seen)), b.alone(work('b', seen))])
    assert seen == ['a begins', 'b begins', 'a ends', 'b ends']


def test_a_failure_leaves_the_arena_to_the_next() -> None:
    def fails() -> Steps[None]:
        yield
        raise OSError

    seen: list[str] = []
    turn = Turn()
    a, b = stubs(turn, turn)
    with pytest.raises(OSError):
        finish(a.alone(fails()))
    begun = a.alone(work('a', seen))
    next(begun)
    begun.close()
    finish(b.alone(work('b', seen)))
    assert seen == ['a begins', 'b begins', 'b ends']
