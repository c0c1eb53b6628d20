# SPDX-License-Identifier: LGPL-2.1-or-later
"""The input of every check of a restart, and the rows that checks make."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from ckptd.errors import Finding
from ckptd.image.reader import ImageReader
from ckptd.kernel.status import Status, read_status
from ckptd.kernel.task import read_cgroup2
from ckptd.objects.attributes.allowed import Allowed
from ckptd.objects.attributes.base import about
from ckptd.protocol.messages import Caller, JobRequest
from ckptd.restore.file_access import FileAccess
from ckptd.restore.file_rights import rights_of
from ckptd.restore.plan import Plan, is_users_worker

__all__ = ['CheckContext', 'about', 'once', 'rows', 'text_of']


@dataclass(frozen=True)
class CheckContext:
    """request: who asks, and for what. looking: the files of this machine, by the rights that the tree's are opened by.
    own: our own process, which every restored task is a descendant of; `may` by its effective capabilities."""
    reader: ImageReader
    plan: Plan
    request: JobRequest
    lookup: FileAccess
    own: Status = field(default_factory=lambda: read_status(os.getpid()))

    @property
    def caller(self) -> Caller:
        return self.request.caller

    @property
    def in_user_namespace(self) -> bool:
        return self.plan.namespaces.user

    @property
    def is_users_worker(self) -> bool:
        return is_users_worker(self.plan)

    def capable(self, capability: int) -> bool:
        """Whether the caller has a capability."""
        return self.lookup.capable(capability)

    def may(self, capability: int) -> bool:
        """Whether we have this capability, which counts for the machine as a whole."""
        return self.allowed.may(capability)

    def may_here(self, capability: int) -> bool:
        """Whether we have a capability in the user namespace of the tree. In a new user namespace we have all."""
        return self.plan.namespaces.user or self.may(capability)

    def caller_may(self, path: str, access: int) -> bool:
        """os.access(2) for the caller, of what the request names."""
        if self.request.brokered and not self.request.caller.uid:
            return True     # root, for whom a worker of another user asks
        with rights_of(self.request.caller).taken():
            return os.access(path, access, effective_ids=True)

    @cached_property
    def allowed(self) -> Allowed:
        """Limits and priorities that the tree may have."""
        return Allowed(self.reader, self.request.hard_limits)

    def beyond(self, obstacle: 'Finding', comes: str) -> 'Finding':
        """Refuse a value that may not be set, or warn if the caller accepts the nearest. comes: the nearest."""
        if self.request.clamp:
            return replace(obstacle, hint=f'it comes back {comes}', severity='warning')
        return replace(obstacle, hint=f'{obstacle.hint}, or take the nearest: --clamp')

    @property
    def for_owner(self) -> int:
        """uid of the image's owner where files are opened by his rights and the caller is root; else 0."""
        return 0 if self.request.caller.uid or self.lookup.by_root else self.lookup.rights.uid

    @cached_property
    def home(self) -> str:
        """The cgroup that the tree is going to be in: as asked for, else as it was, else ours; '' for none."""
        return self.request.cgroup or self.plan.processes[0].ids.cgroup or read_cgroup2(os.getpid())

    @cached_property
    def leaders(self) -> list[int]:
        """vpids of the processes that live."""
        return [process.vpid for process in self.plan.processes if process.alive]


def text_of(one: Finding) -> tuple[str, str, str, str]:
    """The text of a finding without its task."""
    return one.errno, one.reason, one.hint, one.severity


def once(obstacles: Iterable[Finding]) -> list[Finding]:
    """The first of those that say the same: one file that is missing is open at many places."""
    first: dict[tuple[str, str, str, str], Finding] = {}
    for one in obstacles:
        first.setdefault(text_of(one), one)
    return list(first.values())


def rows(context: CheckContext, obstacles: Iterable[Finding]) -> list[Finding]:
    """Turn obstacles into refusals, with the names of tasks from the image."""
    names = {task.vpid: task.record.comm for task in context.reader.tasks}
    return [replace(one, comm=names.get(one.pid, '')) for one in dict.fromkeys(obstacles)]
