# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the owner of a tree, as far as a caller may know it before a job begins. Tasks that /proc hides from the caller
(hidepid= of proc(5)) behave as if they did not exist."""

import asyncio
from collections.abc import Collection
from typing import NamedTuple

from ckptd.errors import InvalidArgument, NoSuchTarget
from ckptd.inspect.scan import resolve_target
from ckptd.jobs.ownership import stranger_in
from ckptd.jobs.queue import Queue
from ckptd.jobs.requests import RequestFactory, start_time_of
from ckptd.jobs.slots import Slots
from ckptd.kernel.ancestry import is_below
from ckptd.kernel.confinement import PID_NAMESPACE
from ckptd.kernel.hidepid import is_hidden_from
from ckptd.kernel.yama import CAPABLE, DECLARED, ptrace_scope
from ckptd.protocol.requests import Caller
from ckptd.target import Target


class TreeOwner(NamedTuple):
    """The owner of a tree."""
    uid: int | None          # the caller's if the whole tree belongs to the caller, else that of process `stranger`;
                             # None if that process is hidden from the caller
    stranger: int            # process that does not belong to the caller; 0 for none, or for a hidden one
    start_time: int          # of the present root of a ProcessTarget, 0 for other targets
    outside: bool = False    # a confined caller may not reach the tree, as not all of it is below the caller


class Visibility:
    def __init__(self, queue: Queue, request_factory: RequestFactory) -> None:
        self._queue, self._request_factory = queue, request_factory
        self._looks = Slots(3, 1)        # for reading /proc: all users share the threads

    async def whose(self, target: Target, caller: Caller) -> TreeOwner:
        """Find the owner of a target. NoSuchTarget, with the same words for a hidden target."""
        if not caller.uid and not caller.confinement:
            # root needs no authorization and does not wait for a look at its target
            return TreeOwner(0, 0, start_time_of(target))
        seen = await self._seen(target, caller)
        start_time, outside = start_time_of(target), await self.is_outside(target, caller)
        if not caller.uid:
            return TreeOwner(0, 0, start_time, outside)
        async with self._looks.slot(caller.uid):
            stranger = await asyncio.to_thread(stranger_in, target, caller)
        if stranger is None:
            return TreeOwner(caller.uid, 0, start_time, outside)
        pid, uid = stranger
        if seen is not None and pid not in seen:
            return TreeOwner(None, 0, start_time, outside)
        return TreeOwner(uid, pid, start_time, outside)

    async def is_outside(self, target: Target, caller: Caller) -> bool:
        """Whether the caller is confined and the target is not all below it. A worker checks again, task by task."""
        if not caller.confinement:
            return False
        async with self._looks.slot(caller.uid):
            return await asyncio.to_thread(_is_outside, target, caller)

    async def is_kept_by_yama(self, target: Target, start_time: int, caller: Caller) -> bool:
        """Whether Yama keeps the caller from tracing tasks that it may inspect, while CAP_SYS_PTRACE would allow it. A
        worker asks the kernel as the caller. NoSuchTarget."""
        if ptrace_scope() not in (DECLARED, CAPABLE):
            return False
        request = self._request_factory.trace(target, caller, start_time)
        return bool((await self._queue.call(request)).get('forbidden'))

    async def _seen(self, target: Target, caller: Caller) -> Collection[int] | None:
        """Return the tasks of the target that the caller sees, or None for all. A worker that becomes the caller looks.
        NoSuchTarget if it sees none."""
        if PID_NAMESPACE not in caller.confinement and not await self._is_hidden(caller):
            return None
        result = await self._queue.call(self._request_factory.scan(target, caller))
        return frozenset(row['tid'] for row in result['tasks'])

    async def _is_hidden(self, caller: Caller) -> bool:
        if not caller.uid:
            return False
        async with self._looks.slot(caller.uid):
            return await asyncio.to_thread(is_hidden_from, {caller.gid, *caller.groups}, caller.pid, caller.start_time)


def _is_outside(target: Target, caller: Caller) -> bool:
    try:
        roots = resolve_target(target).roots
    except (NoSuchTarget, InvalidArgument):
        return True     # the error itself may be private, so treat the target as outside
    return not all(is_below(root, caller.pid, caller.start_time) for root in roots)
