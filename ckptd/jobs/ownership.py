# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose a tree is, as far as that decides which question polkit is asked. The kernel decides about each task later."""

from collections.abc import Iterable

from ckptd.inspect.scan import resolve_target, scan_tree
from ckptd.kernel.status import read_status
from ckptd.protocol.messages import Caller


def stranger_in(target: str, caller: Caller) -> tuple[int, int] | None:
    """(pid, uid) of the first process of the tree that is not all the caller's; None if there is none. target: as
    parse_target spells it. NoSuchTarget. Reads /proc for some milliseconds."""
    roots = resolve_target(target, caller.pid).roots
    # the roots first: of what begins with a stranger the rest is none of the caller's business
    return _first(roots, caller.uid) or _first((task.tgid for task in scan_tree(roots).leaders), caller.uid)


def _first(pids: Iterable[int], uid: int) -> tuple[int, int] | None:
    for pid in pids:
        try:
            uids = set(read_status(pid).uids[:3])
        except ProcessLookupError:
            continue
        if uids != {uid}:
            return pid, min(uids - {uid})
    return None
