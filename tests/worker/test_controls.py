# SPDX-License-Identifier: LGPL-2.1-or-later
"""What prctl(2) and membarrier(2) have set is in the image."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.image.reader import ImageReader
from ckptd.image.records import Mm, Namespaces, ThreadControls
from ckptd.kernel.task import read_namespaces
from tests.lib.victim import Victim
from tests.worker.driver import Place

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

PR_TSC_ENABLE = 1
PR_MCE_KILL_EARLY, PR_MCE_KILL_DEFAULT = 1, 2
PR_SPEC_PRCTL, PR_SPEC_DISABLE = 1, 4
# <linux/membarrier.h>, Linux 6.3; older kernels do not say
REGISTER_PRIVATE_EXPEDITED = 1 << 4


def test_controls(victim: Callable[..., Victim], tmp_path: Path) -> None:
    running = victim('attributes')
    with ImageReader(Place(tmp_path).make().checkpoint(running.pid)) as reader:
        [mm] = reader.every(Mm)
        leader, thread = (reader.get(ThreadControls, task.vpid) for task in reader.tasks)
    assert mm.coredump_filter == 0x25
    assert mm.membarrier in (REGISTER_PRIVATE_EXPEDITED, 0)
    assert (mm.mdwe, mm.memory_merge) in ((1, 1), (1, 0), (0, 0))
    assert (leader.tsc, leader.mce_kill, leader.io_flusher) == (PR_TSC_ENABLE, PR_MCE_KILL_DEFAULT, 0)
    assert (thread.tsc, thread.mce_kill, thread.io_flusher) == (PR_TSC_ENABLE, PR_MCE_KILL_EARLY, 0)
    if thread.speculation[0] & PR_SPEC_PRCTL:
        assert thread.speculation[0] & PR_SPEC_DISABLE
    running.finish()


def test_namespaces(victim: Callable[..., Victim], tmp_path: Path) -> None:
    running = victim('counter')
    with ImageReader(Place(tmp_path).make().checkpoint(running.pid)) as reader:
        [found] = reader.every(Namespaces)
        assert {one.name: one.inode for one in found.namespaces} == read_namespaces(running.pid)
        assert all(one.own for one in found.namespaces)
