# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits for the stubs of a restart: a stub that dies or does not answer ends the restart, and nothing is left of it."""

import os
import signal
import struct
import time
from collections.abc import Callable

import pytest

from ckptd.errors import Cancelled, CkptError
from ckptd.kernel.clone import CLONE_THREAD, CLONE_VM
from ckptd.kernel.ptrace import endless
from ckptd.operation.deadline import Patience, stub_patience
from ckptd.remote.batch import Batch
from ckptd.remote.interleave import Steps
from ckptd.remote.stub import Stub
from ckptd.restore.bootstrap import find_arena, start_bootstrap
from ckptd.restore.create import TaskBuilder
from tests.worker.conftest import in_child

pytestmark = [pytest.mark.needs('root', 'ptrace'), pytest.mark.timeout(30)]

CLONE_SIGHAND = 0x800       # <linux/sched.h>
BANK = 512                  # the first fd that stubs keep


def in_worker(work: Callable[[TaskBuilder, Stub], None], patience: Patience | None = None) -> None:
    """work(nursery, stub) in a child that is set up as a worker is. The stub is a process with two threads."""
    def child() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        bootstrap = start_bootstrap(find_arena([]), BANK, patience or endless)
        with TaskBuilder(bootstrap, -1) as builder:
            stub = builder.clone(bootstrap, 0, 0, signal.SIGCHLD)
            builder.others[stub.tid] = stub
            builder.clone(stub, 0, CLONE_VM | CLONE_SIGHAND | CLONE_THREAD)
            work(builder, stub)

    assert in_child(child) == 0


def asleep(stub: Stub) -> Steps[object]:
    """A batch of it that has begun and takes long."""
    batch = Batch()
    batch.call('nanosleep', batch.buffer(16, struct.pack('<2q', 1000, 0)), 0)
    steps = stub.run(batch)
    next(steps)
    return steps


def test_a_stub_with_threads_that_is_killed_in_a_batch() -> None:
    """Its leader is a zombie that cannot be reaped before its threads: the worker waited for ever."""
    def work(builder: TaskBuilder, stub: Stub) -> None:
        steps = asleep(stub)
        os.kill(stub.tid, signal.SIGKILL)
        with pytest.raises(CkptError, match=f'task {stub.tid} was killed while it was restored'):
            next(steps)

    in_worker(work)


def test_a_stub_that_does_not_answer_is_no_obstacle_to_a_cancel() -> None:
    def check() -> None:
        if asked:
            raise Cancelled('the job was cancelled')

    def work(builder: TaskBuilder, stub: Stub) -> None:
        steps = asleep(stub)
        asked.append(True)
        began = time.monotonic()
        with pytest.raises(Cancelled):
            next(steps)
        assert time.monotonic() - began < 2

    asked: list[bool] = []
    in_worker(work, stub_patience(check))


def test_a_stub_that_does_not_answer_ends_the_restart() -> None:
    def work(builder: TaskBuilder, stub: Stub) -> None:
        steps = asleep(stub)
        with pytest.raises(CkptError, match=r'has not stopped for its tracer within 1 s: state S, sleeps in \w*nanosl'):
            next(steps)

    in_worker(work, Patience(1, lambda: None, kind=CkptError))
