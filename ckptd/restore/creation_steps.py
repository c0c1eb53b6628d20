# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps by which the tasks of an image are made again: data, to be shown or carried out. Pure."""

from dataclasses import dataclass

from ckptd.kernel.clone import CLONE_THREAD

TEMPORARY = -1          # the maker of an orphan, itself made by a task of the tree


@dataclass(frozen=True, slots=True)
class CreateTask:
    """Task `maker` makes process `vpid` (0: a number of no importance), or a thread of its own."""
    vpid: int
    maker: int
    flags: int = 0
    exit_signal: int = 0

    def __str__(self) -> str:
        what = 'thread' if self.flags & CLONE_THREAD else 'process'
        return f'{what} {self.vpid} made by {self.maker or "ckptd"}'


@dataclass(frozen=True, slots=True)
class NewSession:
    vpid: int

    def __str__(self) -> str:
        return f'{self.vpid} begins session {self.vpid}'


@dataclass(frozen=True, slots=True)
class JoinGroup:
    vpid: int
    vpgid: int

    def __str__(self) -> str:
        return f'{self.vpid} joins group {self.vpgid}'


@dataclass(frozen=True, slots=True)
class Subreaper:
    """Orphans below `vpid` become its children, while it is on."""
    vpid: int
    on: bool

    def __str__(self) -> str:
        return f'{self.vpid} {"takes" if self.on else "no longer takes"} orphans'


@dataclass(frozen=True, slots=True)
class Dismiss:
    """A ghost ends, and `waiter` forgets it."""
    vpid: int
    waiter: int

    def __str__(self) -> str:
        return f'{self.vpid} was only needed for its number, and ends'


@dataclass(frozen=True, slots=True)
class Fill:
    """Address space `mm_id` gets its pages by the task `vpid`, before others inherit them."""
    mm_id: int
    vpid: int

    def __str__(self) -> str:
        return f'{self.vpid} reads its memory'


@dataclass(frozen=True, slots=True)
class Clear:
    """Process `vpid` gives up all memory that it has inherited."""
    vpid: int

    def __str__(self) -> str:
        return f'{self.vpid} drops the memory of its maker'


Step = CreateTask | NewSession | JoinGroup | Subreaper | Dismiss | Fill | Clear
