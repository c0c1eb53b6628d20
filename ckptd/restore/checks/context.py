# SPDX-License-Identifier: LGPL-2.1-or-later
"""The input of every check of a restart, and the rows that checks make."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ckptd.errors import Finding
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.kernel.status import Status, read_status
from ckptd.kernel.task import read_cgroup2
from ckptd.objects.attributes.allowed import Allowed
from ckptd.objects.attributes.base import about
from ckptd.protocol.requests import Caller, RestartRequest
from ckptd.restore.file_access import FileAccess
from ckptd.restore.file_rights import rights_of
from ckptd.restore.plan import Plan, is_users_worker

__all__ = ['CheckContext', 'about', 'once', 'rows', 'text_of']


@dataclass(frozen=True)
class CheckContext:
    """The input of the checks."""
    reader: ImageReader
    plan: Plan
    request: RestartRequest                             # with the caller and the options
    lookup: FileAccess                                  # the files of this machine, with the rights that the tree's
                                                        # files are opened with
    # our own process, from which every restored task descends; `may` uses its effective capabilities
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
        """Whether we have this capability, in the user namespace of the machine."""
        return self.allowed.may(capability)

    def may_here(self, capability: int) -> bool:
        """Whether we have a capability in the user namespace of the tree. In a new user namespace we have all."""
        return self.plan.namespaces.user or self.may(capability)

    def caller_may(self, path: str, access: int) -> bool:
        """Whether the caller has access to a path of the request, as in os.access(2)."""
        if self.request.brokered and not self.request.caller.uid:
            return True     # root, on whose behalf a worker of another user runs
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
        """Uid of the image's owner, if files are opened with the owner's rights and the caller is root; else 0."""
        return 0 if self.request.caller.uid or self.lookup.by_root else self.lookup.rights.uid

    def by_whom(self, row: Finding) -> Finding:
        """Complete the hint for root, who has access to the file and may not expect that the rights of another user
        count."""
        uid = self.for_owner
        if not uid or row.severity == 'warning':
            return row
        if row.errno in ('EACCES', 'EPERM'):
            return replace(row, hint=f'files are opened with the rights of uid {uid}, who owns the image: give them '
                                'access to it, or checkpoint the tree as root')
        if row.errno == 'ENOENT':
            return replace(row, hint=f'{row.hint}; uid {uid}, who owns the image, must have access to it')
        return row

    def out_of_reach(self, vpid: int, resource: str, path: str, flags: int = 0) -> Finding | None:
        """Return a finding if the user's rights cannot open a path with these flags, whatever is there."""
        if path and (reason := self.lookup.out_of_reach(path, flags)):
            return about(vpid, resource, 'EACCES', f'{path} is not opened: {reason}', 'put back what was there at the '
                         'time of the checkpoint')
        return None

    @cached_property
    def home(self) -> str:
        """The future cgroup of the tree: the requested one, else the former one, else ours; '' for none."""
        return self.request.cgroup or self.plan.processes[0].ids.cgroup or read_cgroup2(os.getpid())

    @cached_property
    def mm_users(self) -> Mapping[int, int]:
        """Vpid of the first living task of each address space, by mm_id."""
        return self.plan.users('mm_id')

    @property
    def alive(self) -> Sequence[ImageTask]:
        """All living tasks."""
        return self.plan.alive

    @cached_property
    def leaders(self) -> list[int]:
        """Vpids of the living processes."""
        return [process.vpid for process in self.plan.processes if process.alive]


def text_of(one: Finding) -> tuple[str, str, str, str]:
    """The text of a finding without its task."""
    return one.errno, one.reason, one.hint, one.severity


def once(obstacles: Iterable[Finding]) -> list[Finding]:
    """Return the first of the findings with equal text: one missing file may be open in many places."""
    first: dict[tuple[str, str, str, str], Finding] = {}
    for one in obstacles:
        first.setdefault(text_of(one), one)
    return list(first.values())


def rows(context: CheckContext, obstacles: Iterable[Finding]) -> list[Finding]:
    """Turn obstacles into refusals, with the names of tasks from the image."""
    names = {task.vpid: task.record.comm for task in context.reader.tasks}
    return [replace(one, comm=names.get(one.pid, '')) for one in dict.fromkeys(obstacles)]
