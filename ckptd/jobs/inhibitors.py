# SPDX-License-Identifier: LGPL-2.1-or-later
"""Delay inhibitors, as logind has them for sleep: a checkpoint of their tree waits a moment until they let go.

Who takes one gets the writing end of a pipe. Nothing is ever written; when all who have it have closed it, by
themselves or by their end, the reading end says so.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from ckptd.errors import LimitsExceeded
from ckptd.jobs.overlap import Lineage, Relations
from ckptd.jobs.target_process import ProcessWatch

MOST_OF_USER = 32
MOST = 512


@dataclass(slots=True, eq=False)
class InhibitorLock:
    """who, why: in words for people. target: as parse_target spells it. sender: the connection that took it. fd: the
    end that says when it is let go. life: of the process that the target is, if it is one; lineage: its, when it was
    taken."""
    who: str
    why: str
    target: str
    uid: int
    pid: int
    sender: str
    fd: int = -1
    life: ProcessWatch | None = None
    lineage: Lineage = ()
    released: asyncio.Event = field(default_factory=asyncio.Event)


class Inhibitors:
    """Those that are held."""

    def __init__(self) -> None:
        self._held: list[InhibitorLock] = []
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held(self) -> tuple[InhibitorLock, ...]:
        return tuple(self._held)

    def take(self, one: InhibitorLock, start_time: int = 0) -> int:
        """A new one: the fd that holds it, the caller's to close. start_time: of the process that is the target, with
        which it ends. LimitsExceeded, NoSuchTarget."""
        own = sum(other.uid == one.uid for other in self._held)
        if one.uid and (own >= MOST_OF_USER or len(self) >= MOST):
            raise LimitsExceeded(f'uid {one.uid} has {own} inhibitors, and there are {len(self)} in all',
                                 resource='inhibitors', hint='close those that are not needed')
        one.life = ProcessWatch.of(one.target, start_time, lambda: self._drop(one))
        one.fd, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        one.lineage = Relations().lineage(one.target)
        self._held.append(one)
        self._loop.add_reader(one.fd, self._drop, one)      # also for one who writes, which is not what it is for
        return theirs

    def of(self, target: str) -> list[InhibitorLock]:
        """Those that a checkpoint of this target has to wait for."""
        relations = Relations({one.target: one.lineage for one in self._held})
        return [one for one in self._held if relations.overlap(one.target, target)]

    async def wait(self, inhibitors: Iterable[InhibitorLock], seconds: float) -> None:
        """Until they have let go, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for one in inhibitors:
                    await one.released.wait()

    def close(self) -> None:
        for one in self.held:
            self._drop(one)

    def _drop(self, one: InhibitorLock) -> None:
        self._loop.remove_reader(one.fd)
        os.close(one.fd)
        if one.life is not None:
            one.life.close()
        self._held.remove(one)
        one.released.set()
