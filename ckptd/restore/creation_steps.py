# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps that make the tasks of an image again, as data to be shown or carried out. Pure."""

from dataclasses import dataclass

from ckptd.kernel.clone import CLONE_THREAD

TEMPORARY = -1          # the maker of an orphan, itself made by a task of the tree


@dataclass(frozen=True, slots=True)
class CreateTask:
    """Let task `maker` make process `vpid` (0: any pid), or a thread of its own."""
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
    """Let `vpid` adopt the orphans below it, while it is on."""
    vpid: int
    on: bool

    def __str__(self) -> str:
        return f'{self.vpid} {"takes" if self.on else "no longer takes"} orphans'


@dataclass(frozen=True, slots=True)
class Dismiss:
    """End a ghost and let `waiter` reap it."""
    vpid: int
    waiter: int

    def __str__(self) -> str:
        return f'{self.vpid} was only needed for its pid, and ends'


@dataclass(frozen=True, slots=True)
class Fill:
    """Let the task `vpid` read the pages of address space `mm_id`, before others inherit them."""
    mm_id: int
    vpid: int

    def __str__(self) -> str:
        return f'{self.vpid} reads its memory'


@dataclass(frozen=True, slots=True)
class Clear:
    """Let process `vpid` drop all inherited memory."""
    vpid: int

    def __str__(self) -> str:
        return f'{self.vpid} drops the memory of its maker'


Step = CreateTask | NewSession | JoinGroup | Subreaper | Dismiss | Fill | Clear
