# SPDX-License-Identifier: LGPL-2.1-or-later
"""What prctl(2) and membarrier(2) have set is in the image."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.image.reader import ImageReader
from ckptd.image.records import Mm, Namespaces
from ckptd.kernel.prctl import PR_MCE_KILL_DEFAULT, PR_SPEC_PRCTL, PR_TSC_ENABLE
from ckptd.kernel.task import read_namespaces
from ckptd.objects.attributes.registry import BY_NAME, Kept
from tests.lib.victim import Victim
from tests.worker.driver import Place

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

PR_MCE_KILL_EARLY, PR_SPEC_DISABLE = 1, 4       # <linux/prctl.h>
# <linux/membarrier.h>, Linux 6.3; older kernels do not say
REGISTER_PRIVATE_EXPEDITED = 1 << 4


def kept(reader: ImageReader, name: str, owner: int, default: int = 0) -> int:
    """The one field of an attribute, or the default where the image has none."""
    found = Kept(reader).record(BY_NAME[name], owner)
    if found is None:
        return default
    [field] = found._codec.fields
    return getattr(found, field.name)


def test_controls(victim: Callable[..., Victim], tmp_path: Path) -> None:
    running = victim('attributes')
    with ImageReader(Place(tmp_path).make().checkpoint(running.pid)) as reader:
        [mm] = [one.mm_id for one in reader.every(Mm)]
        leader, thread = (task.vpid for task in reader.tasks)
        assert kept(reader, 'coredump_filter', mm) == 0x25
        assert kept(reader, 'membarrier', mm) in (REGISTER_PRIVATE_EXPEDITED, 0)
        assert (kept(reader, 'PR_SET_MDWE', mm), kept(reader, 'PR_SET_MEMORY_MERGE', mm)) in ((1, 1), (1, 0), (0, 0))
        for vpid, mce_kill in ((leader, PR_MCE_KILL_DEFAULT), (thread, PR_MCE_KILL_EARLY)):
            assert kept(reader, 'PR_SET_TSC', vpid, PR_TSC_ENABLE) == PR_TSC_ENABLE
            assert kept(reader, 'PR_MCE_KILL', vpid, PR_MCE_KILL_DEFAULT) == mce_kill
            assert kept(reader, 'PR_SET_IO_FLUSHER', vpid) == 0
        speculation = Kept(reader).record(BY_NAME['speculation'], thread)
        if speculation and speculation.states[0] & PR_SPEC_PRCTL:
            assert speculation.states[0] & PR_SPEC_DISABLE
    running.finish()


def test_namespaces(victim: Callable[..., Victim], tmp_path: Path) -> None:
    running = victim('counter')
    with ImageReader(Place(tmp_path).make().checkpoint(running.pid)) as reader:
        [found] = reader.every(Namespaces)
        assert {one.name: one.inode for one in found.namespaces} == read_namespaces(running.pid)
        assert all(one.own for one in found.namespaces)
