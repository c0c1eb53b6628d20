# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tracing for the engine's tests: done by this process, or by a child that may die of it."""

import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from ckptd.kernel.ptrace import Tracee
from ckptd.remote.borrow import OwnIds
from tests.lib.forked import forked
from tests.worker.driver import Place
from tests.worker.faulty import Gate

__all__ = ['forked', 'in_child', 'tracer']


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Where checkpoints of a worker without a daemon go."""
    return Place(tmp_path).make()


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    """Where the workers of a daemon started with its environment ask before they go on."""
    gate = Gate()
    yield gate
    gate.close()


@pytest.fixture
def tracer() -> Iterator[Callable[[int], tuple[Tracee, OwnIds]]]:
    """Seize and stop a process's leader; let go of at the end, if the test has not done so."""
    tracees: list[Tracee] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])

    def stop(pid: int) -> tuple[Tracee, OwnIds]:
        tracee = Tracee.seize(pid)
        tracees.append(tracee)
        tracee.stop(time.monotonic() + 10)
        return tracee, OwnIds(pid, pid)

    yield stop
    for tracee in tracees:
        tracee.detach()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_child(work: Callable[[], object]) -> int:
    """Do the work in a forked child; its wait status. For tracers that are to die."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]
