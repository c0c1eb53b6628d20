# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the owner of a tree, to decide which question polkit is asked. The kernel decides about each task later."""

from collections.abc import Iterable

from ckptd.inspect.scan import resolve_target, scan_tree
from ckptd.kernel.status import read_status
from ckptd.protocol.requests import Caller
from ckptd.target import Target


def stranger_in(target: Target, caller: Caller) -> tuple[int, int] | None:
    """Return (pid, uid) of the first process of the tree that does not wholly belong to the caller, or None.
    NoSuchTarget. This reads /proc for some milliseconds."""
    roots = resolve_target(target).roots
    # Check the roots first. If a root belongs to another user, the caller must not learn about the rest.
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
