# SPDX-License-Identifier: LGPL-2.1-or-later
"""Speculation controls of a thread (PR_SET_SPECULATION_CTRL(2const))."""

from functools import cache

from ckptd.image.grammar import U32, Struct, layout
from ckptd.kernel.prctl import (
    PR_GET_SPECULATION_CTRL,
    PR_SET_SPECULATION_CTRL,
    PR_SPEC_INDIRECT_BRANCH,
    PR_SPEC_L1D_FLUSH,
    PR_SPEC_PRCTL,
    PR_SPEC_STORE_BYPASS,
    prctl,
)
from ckptd.objects.attributes.base import Attribute, DumpedTask, Reader, RestoredTask
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch

_CONTROLS = (PR_SPEC_STORE_BYPASS, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_L1D_FLUSH)


@layout
class Controls(Struct):
    """PR_SPEC_* of each of _CONTROLS; 0 for one that the kernel does not have. A thread may set those with
    PR_SPEC_PRCTL."""
    states: tuple[U32, ...]


class Speculation(Attribute[Controls, tuple[int, ...]], name='speculation'):
    support = Support('speculation controls')

    def ask(self, batch: Batch) -> Reader[tuple[int, ...]]:
        calls = [batch.call('prctl', PR_GET_SPECULATION_CTRL, which, 0, 0, 0) for which in _CONTROLS]
        return lambda results: tuple(results.or_else(call, 0) for call in calls)

    def dump(self, of: DumpedTask, answer: tuple[int, ...]) -> Controls | None:
        return Controls(answer) if any(state & PR_SPEC_PRCTL for state in answer) else None

    def restore(self, record: Controls, to: RestoredTask) -> None:
        for which, (wanted, ours) in enumerate(zip(record.states, _own(), strict=False)):
            if wanted & PR_SPEC_PRCTL and wanted != ours:
                to.script.call('prctl', PR_SET_SPECULATION_CTRL, which, wanted & ~PR_SPEC_PRCTL, 0, 0,
                               about='speculation')


@cache
def _own() -> tuple[int, ...]:
    """Return our own controls, which stubs inherit."""
    found = []
    for which in _CONTROLS:
        try:
            found.append(prctl(PR_GET_SPECULATION_CTRL, which, 0, 0, 0))
        except OSError:
            found.append(0)
    return tuple(found)
