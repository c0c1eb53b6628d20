# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs for calls.c: lists of operations, of which each becomes a few system calls.

An operation is a function of this package with the decorator `operation`, which names the strategies of its arguments.
What an operation refers to, such as an open file, it chooses by a number among those that there are at that point: so
each operation can be left out, and a failing program shrinks.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

_HEADERS = (Path('/usr/include/x86_64-linux-gnu/asm/unistd_64.h'), Path('/usr/include/asm/unistd_64.h'))
# younger than the headers of the oldest distribution in use
_YOUNG = {'set_mempolicy_home_node': 450, 'cachestat': 451, 'map_shadow_stack': 453, 'mseal': 462}
_MAX_FILES = 40


@cache
def system_calls() -> dict[str, int]:
    """Numbers by name."""
    text = next(path for path in _HEADERS if path.exists()).read_text()
    return {**_YOUNG, **{name: int(number) for name, number in re.findall(r'#define __NR_(\w+)\s+(\d+)', text)}}


@dataclass
class Program:
    """The steps so far. files: arguments that are open files. children: those that are pids of children. shared: files
    of the machine, whose mode and owner must not be changed."""
    lines: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    children: list[str] = field(default_factory=list)
    timers: list[str] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)

    def call(self, name: str, *arguments: int | str | bytes) -> str:
        """Add a system call; the argument that is its result."""
        words = [f'={one.hex()}' if isinstance(one, bytes) else str(one) for one in arguments]
        self.lines.append(' '.join([str(system_calls()[name]), *words]))
        return f'${len(self.lines) - 1}'

    def add_file(self, *arguments: str, is_shared: bool = False) -> None:
        self.files += arguments
        self.shared |= {*arguments} if is_shared else set()

    def buffer(self, word: int) -> str:
        """The argument that is a word of the output buffer of the last step."""
        return f'&{len(self.lines) - 1}:{word}'

    def file(self, number: int) -> str:
        return self.files[number % len(self.files)] if self.files else '-1'

    def child(self, number: int) -> str:
        """The pid of a child, or the own one."""
        return [*self.children, 'P'][number % (len(self.children) + 1)]

    def block(self, kind: str, operations: 'list[Operation]') -> None:
        """Add a child or a thread that does these operations."""
        self.lines.append(kind)
        step = f'${len(self.lines) - 1}'
        files, children, timers = [*self.files], [*self.children], [*self.timers]
        for one in operations:
            one.add_to(self)
        if kind == 'fork':
            self.files, self.children = files, [*children, step]
        self.timers = timers
        self.lines.append('end')

    @property
    def text(self) -> str:
        return '\n'.join(self.lines) + '\n'


@dataclass(frozen=True)
class Operation:
    """One operation with its arguments."""
    name: str
    arguments: dict[str, Any]

    def add_to(self, program: Program) -> None:
        _DO[self.name](program, **self.arguments)

    def __repr__(self) -> str:
        return f'{self.name}({", ".join(f"{name}={_shown(value)}" for name, value in self.arguments.items())})'


def _shown(value: Any) -> str:
    return f'{value:#x}' if isinstance(value, int) and value > 9 else repr(value)


_DO: dict[str, Callable[..., None]] = {}
_STRATEGIES: list[st.SearchStrategy[Operation]] = []


def operation(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function an operation: it gets the program, and an argument from each strategy."""
    def add(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        assert name not in _DO, f'two operations {name}'
        _DO[name] = function
        _STRATEGIES.append(st.builds(lambda **drawn: Operation(name, drawn), **strategies))
        return function
    return add


def operations(depth: int = 2) -> st.SearchStrategy[Operation]:
    """Any operation; with a depth, also a child or a thread that does some."""
    simple = st.one_of(_STRATEGIES)
    if not depth:
        return simple
    inner = st.lists(operations(depth - 1), max_size=6)
    blocks = [st.builds(_in_block, st.just(kind), inner) for kind in ('fork', 'thread')]
    # most operations are no blocks
    return st.one_of(*[simple] * 8, *blocks)


def _in_block(kind: str, inner: list[Operation]) -> Operation:
    return Operation(kind, {'inner': inner})


def programs() -> st.SearchStrategy[list[Operation]]:
    """Short programs and long ones."""
    return st.one_of(st.lists(operations(), min_size=1, max_size=8), st.lists(operations(), min_size=15, max_size=40))


def program_of(steps: list[Operation]) -> Program:
    program = Program()
    for one in steps:
        one.add_to(program)
    return program


def _block(kind: str) -> Callable[..., None]:
    def add(program: Program, inner: list[Operation]) -> None:
        program.block(kind, inner)
    return add


_DO.update(fork=_block('fork'), thread=_block('thread'))
