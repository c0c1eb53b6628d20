# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is killed, and when: processes of ckptd by their part in a job, at a moment of the time that they live.

    daemon      the daemon that serves the bus
    spawner     its child, which forks all others
    broker      the spawner's child, root's, of this job
    launcher    the broker's child, as long as it is root
    worker      the same, as soon as it is the user
"""

import contextlib
import itertools
import os
import select
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from ckptd.kernel.status import read_status
from tests.kills.stage import Stage
from tests.lib.systembus import children_of

ROLES = ('worker', 'launcher', 'broker', 'daemon', 'spawner')
ONE: tuple[tuple[str, ...], ...] = tuple((role,) for role in ROLES)
TWO: tuple[tuple[str, ...], ...] = tuple(itertools.permutations(ROLES, 2))      # in this order
GAP = 0.005         # seconds at most between the two kills of a pair
INTERVAL = 3e-4     # seconds between two looks
Ended = Callable[[], bool]


def find(stage: Stage, spawner: int, role: str) -> int:
    """The pid of who has this part now; 0 for nobody."""
    if role == 'daemon':
        return stage.daemon.pid
    if role == 'spawner':
        return spawner
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        brokers = children_of(spawner)
        if role == 'broker':
            return next(iter(brokers), 0)
        for pid in (child for broker in brokers for child in children_of(broker)):
            if (role == 'worker') == (read_status(pid).uids[0] != 0):
                return pid
    return 0


class Moment(NamedTuple):
    """When somebody is killed: after `share` of the time that they usually live. gap: seconds to the next one."""
    share: float
    gap: float


@dataclass
class Lifetimes:
    """For how many seconds each part is there, by operation and role: of each job that nobody disturbed."""
    seen: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def usual(self, operation: str, role: str) -> float:
        """The median."""
        return statistics.median(self.seen[operation, role])

    def watch(self, stage: Stage, operation: str, over: Ended) -> None:
        """Look at all parts until a job is over."""
        spawner, begin = stage.spawner, time.monotonic()
        first, last = {}, {}
        while not over():
            time.sleep(INTERVAL)        # a look takes time from those who work
            now = time.monotonic()
            for role in ('worker', 'launcher', 'broker'):
                if find(stage, spawner, role):
                    first.setdefault(role, now)
                    last[role] = time.monotonic()
        end = time.monotonic()
        there = {role: last[role] - first[role] for role in first}
        for role, seconds in {**there, 'daemon': end - begin, 'spawner': end - begin}.items():
            self.seen.setdefault((operation, role), []).append(seconds)


def moment(random: Random) -> Moment:
    return Moment(random.random(), random.choice((0.0, random.random() * GAP)))


def strike(stage: Stage, who: Sequence[str], lifetime: float, at: Moment, over: Ended) -> list[str]:
    """Kill them; the roles of those who lived until then. lifetime: of the first."""
    spawner, first = stage.spawner, who[0]
    while not find(stage, spawner, first):
        if over():
            return []
        time.sleep(INTERVAL / 10 if first == 'launcher' else INTERVAL)      # it is there for a moment only
    time.sleep(lifetime * at.share)
    killed = []
    with contextlib.ExitStack() as stack:
        # all of them now: children of a spawner that is dead have another parent
        for number, (role, pidfd) in enumerate(_open(stage, spawner, who, stack)):
            if number:
                time.sleep(at.gap)
            if _kill(pidfd):
                killed.append(role)
    return killed


def _open(stage: Stage, spawner: int, who: Sequence[str], stack: contextlib.ExitStack) -> list[tuple[str, int]]:
    found = []
    for role in who:
        with contextlib.suppress(ProcessLookupError):
            if pid := find(stage, spawner, role):
                found.append((role, os.pidfd_open(pid)))
                stack.callback(os.close, found[-1][1])
    return found


def _kill(pidfd: int) -> bool:
    """Whether it was alive."""
    if select.select([pidfd], [], [], 0)[0]:
        return False
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
