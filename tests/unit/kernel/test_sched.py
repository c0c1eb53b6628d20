# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scheduling attributes."""

import os
from collections.abc import Callable

import psutil
import pytest

from ckptd.kernel.sched import ioprio_get, sched_getattr

CLASS_BEST_EFFORT = 2       # <linux/ioprio.h>


def test_this_thread_by_both_names() -> None:
    mine = sched_getattr(0)
    assert mine._replace(runtime=0) == sched_getattr(os.getpid())._replace(runtime=0)
    assert (mine.policy, mine.nice) == (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0))


def test_a_child_with_attributes_of_its_own(forked: Callable[..., int]) -> None:
    def setup() -> None:
        os.nice(7)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, 6)
    pid = forked(setup)
    attr = sched_getattr(pid)
    assert (attr.policy, attr.nice, attr.priority) == (os.SCHED_BATCH, os.nice(0) + 7, 0)
    assert ioprio_get(pid) == CLASS_BEST_EFFORT << 13 | 6


@pytest.mark.needs('root')
def test_real_time(forked: Callable[..., int]) -> None:
    pid = forked(lambda: os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(3)))
    attr = sched_getattr(pid)
    assert (attr.policy, attr.priority, attr.flags) == (os.SCHED_FIFO, 3, 1)    # SCHED_FLAG_RESET_ON_FORK


def test_gone() -> None:
    with pytest.raises(ProcessLookupError, match='sched_getattr'):
        sched_getattr(2**22 + 1)
    with pytest.raises(ProcessLookupError, match='ioprio_get'):
        ioprio_get(2**22 + 1)
