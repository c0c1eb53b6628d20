# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose a tree is, as far as that decides which question polkit is asked. The kernel decides about each task later."""

from ckptd.engine.messages import Caller
from ckptd.kernel.status import read_status
from ckptd.scan import resolve_target, scan_tree


def stranger_in(target: str, caller: Caller) -> tuple[int, int] | None:
    """(pid, uid) of the first process of the tree that is not all the caller's; None if there is none. target: as
    parse_target spells it. NoSuchTarget. Reads /proc for some milliseconds."""
    for task in scan_tree(resolve_target(target, caller.pid).roots).leaders:
        try:
            uids = set(read_status(task.tgid).uids[:3])
        except ProcessLookupError:
            continue
        if uids != {caller.uid}:
            return task.tid, min(uids - {caller.uid})
    return None
