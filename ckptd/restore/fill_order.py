# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which address spaces are filled: those that are inherited before the first child is forked, others at
the end. Pure."""

from collections.abc import Callable, Mapping, Sequence

from ckptd.kernel.clone import CLONE_VM
from ckptd.restore.creation_steps import TEMPORARY, Clear, CreateTask, Fill, Step


def with_fills(steps: Sequence[Step], mms: Mapping[int, int], shares: Callable[[int, int], bool]
               ) -> tuple[list[Step], dict[int, int]]:
    """Return the steps with those for memory, and the inheritance: mm_id of the maker by mm_id of the child.

    mms: mm_id by vpid, of all tasks that have memory. shares(maker's, child's): whether the two have pages in common.
    """
    result: list[Step] = []
    origins: dict[int, int] = {}
    filled: set[int] = set()
    theirs = mine = 0
    inherits = False
    for index, step in enumerate(steps):
        if not isinstance(step, CreateTask) or step.flags & CLONE_VM:
            result.append(step)
            continue
        if step.maker != TEMPORARY:
            child = step.vpid
            if not child:       # a temporary maker: its child is the next process that is made
                child = next((after.vpid for after in steps[index + 1:] if isinstance(after, CreateTask)), 0)
            theirs, mine = mms.get(step.maker, 0), mms.get(child, 0)
            inherits = bool(theirs and mine) and shares(theirs, mine)
            if inherits and theirs not in filled:
                filled.add(theirs)
                result.append(Fill(theirs, step.maker))
        result.append(step)
        if step.vpid and inherits:
            origins[mine] = theirs
        elif step.vpid and (theirs in filled or theirs in origins):
            # memory that the maker was filled with, or has inherited itself
            result.append(Clear(step.vpid))
    return result, origins
