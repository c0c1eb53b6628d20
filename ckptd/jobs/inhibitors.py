# SPDX-License-Identifier: LGPL-2.1-or-later
"""Delay inhibitors, like logind's for sleep: the checkpoint of a tree waits a moment until they are released.

The holder gets the writing end of a pipe. Nothing is ever written. When all processes that have this end have closed
it, or died, the reading end reports that.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from ckptd.errors import LimitsExceeded
from ckptd.jobs.overlap import Lineage, Relations
from ckptd.jobs.target_process import ProcessWatch
from ckptd.target import Target

MOST_OF_USER = 32
MOST = 512


@dataclass(slots=True, eq=False)
class InhibitorLock:
    """A held inhibitor."""
    who: str       # name of the program, for people
    why: str       # reason, for people
    target: Target
    uid: int
    pid: int
    sender: str                         # the connection that took it
    fd: int = -1                        # the reading end, which reports the release
    life: ProcessWatch | None = None    # of the target, if that is a process
    lineage: Lineage = ()               # of the target, when the inhibitor was taken
    released: asyncio.Event = field(default_factory=asyncio.Event)


class Inhibitors:
    """All held inhibitors."""

    def __init__(self) -> None:
        self._held: list[InhibitorLock] = []
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held(self) -> tuple[InhibitorLock, ...]:
        return tuple(self._held)

    def take(self, one: InhibitorLock, start_time: int = 0) -> int:
        """Take an inhibitor. Return the fd that holds it, which the caller closes. start_time: start time of the target
        process, with which the inhibitor ends. LimitsExceeded, NoSuchTarget."""
        own = sum(other.uid == one.uid for other in self._held)
        if one.uid and (own >= MOST_OF_USER or len(self) >= MOST):
            raise LimitsExceeded(f'too many inhibitors: uid {one.uid} has {own}, all users have {len(self)}',
                                 resource='inhibitors', hint='close those that are not needed')
        one.life = ProcessWatch.of(one.target, start_time, lambda: self._drop(one))
        one.fd, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        one.lineage = Relations().lineage(one.target)
        self._held.append(one)
        # a holder that writes, which is not the purpose of the pipe, releases it as well
        self._loop.add_reader(one.fd, self._drop, one)
        return theirs

    def of(self, target: Target) -> list[InhibitorLock]:
        """Return the inhibitors that a checkpoint of this target has to wait for."""
        relations = Relations({one.target: one.lineage for one in self._held})
        return [one for one in self._held if relations.overlap(one.target, target)]

    async def wait(self, inhibitors: Iterable[InhibitorLock], seconds: float) -> None:
        """Wait until the inhibitors are released, or the time is over."""
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
