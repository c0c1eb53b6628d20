# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cgroups of a user's restored tree, and a barrier that lets all of its processes run or none.

The worker makes the processes in its own cgroup. The broker moves them, stopped, into a frozen cgroup of its own. When
the worker has released all of them, the broker thaws that cgroup with one write. If the worker dies before, the tree is
ended.

A process goes back to its former cgroup if that belongs to the user: below the user's slice or the calling process's
cgroup, or delegated to the user. Otherwise systemd makes a scope in the user's slice; without systemd it goes to the
cgroup of the calling process. The image is the user's own statement and can never lead to a cgroup of others.
"""

import os
from collections.abc import Sequence

from ckptd.errors import CkptError, PermissionDenied
from ckptd.freezer.groups import is_below
from ckptd.journal.steps import RestartStep
from ckptd.kernel.cgroup import Cgroup, find_mount
from ckptd.kernel.creds import file_rights
from ckptd.kernel.pidfd import held
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2
from ckptd.operation.context import JobContext
from ckptd.protocol.broker_calls import Placed
from ckptd.protocol.requests import RestoreRequest
from ckptd.restore.cgroups import BirthCgroup
from ckptd.worker.broker.identity import Identity


class TreePlace:
    """The place of one tree, and the journal of what the worker makes for it."""

    def __init__(self, job: JobContext[RestoreRequest], identity: Identity, worker: int) -> None:
        self._job, self._identity, self._worker = job, identity, worker
        self._place: BirthCgroup | None = None
        self._is_settled = False

    def note(self, step: RestartStep) -> None:
        """Write a step of the worker to the journal. CkptError if that fails."""
        self._birth_cgroup().note(step)

    def keep_content(self) -> tuple[str, int]:
        """Make a file for kept content, as BirthCgroup does."""
        return self._birth_cgroup().keep_content()

    def settle(self, processes: Sequence[Placed]) -> None:
        """Put stopped processes into their cgroups, frozen. PermissionDenied for a process that is not a stub of the
        worker."""
        if self._is_settled or not processes:
            raise PermissionDenied('the tree is placed already, or has no process')
        self._is_settled = True
        # /proc of the worker shows other start times if it is in a time namespace
        born = {process.pid: self._require_stub(process.pid) for process in processes}
        homes = self._homes(processes)
        place = self._birth_cgroup()
        place.want(homes, None if all(homes.values()) else f'user-{self._identity.uid}.slice')
        place.prepare()
        place.settle({process.pid: process.pid for process in processes})
        if any(self._require_stub(pid) != start_time for pid, start_time in born.items()):
            raise PermissionDenied('a process of this restart has died, and another one has its pid')

    def start(self) -> list[str]:
        """Start the tree: the worker has released all tasks. From here on the tree lives. Return warnings, one sentence
        each."""
        if self._place is None or not self._is_settled:
            raise PermissionDenied('the tree is not placed yet')
        self._place.lift_barrier()
        return [warning.reason for warning in self._place.warnings]

    def close(self) -> None:
        """End a tree that does not live yet, and undo the steps noted for it."""
        if self._place is not None:
            self._place.__exit__(None, None, None)

    def _birth_cgroup(self) -> BirthCgroup:
        if self._place is None:
            self._place = BirthCgroup(self._job)
        return self._place

    def _require_stub(self, pid: int) -> int:
        """Return the start time of a stub. It must be traced by the worker, younger than it, the user's, and without
        further rights."""
        try:
            stat, status = read_stat(pid), read_status(pid)
            is_stub = (stat.start_time >= read_stat(self._worker).start_time and status.tracer_pid == self._worker
                       and {*status.uids} == {self._identity.uid}
                       and not status.cap_prm | status.cap_inh | status.cap_amb)
        except ProcessLookupError:
            raise CkptError(f'process {pid} died while it was restored', task=pid) from None
        if not is_stub:
            raise PermissionDenied(f'process {pid} is not a stub of this restart', task=pid)
        return stat.start_time

    # ------------------------------------------------------------ cgroups of the processes

    def _homes(self, processes: Sequence[Placed]) -> dict[int, str]:
        """Return a cgroup by pid; '' where systemd is to make a scope."""
        own = self._callers_cgroup()
        fallback = '' if self._job.request.systemd else own
        asked = self._job.request.cgroup
        if asked and self._job.request.caller.uid and not self._is_users(asked, own):
            raise PermissionDenied(f'the caller may not put processes into cgroup {asked}', resource=asked,
                                   hint='choose a writable one with --cgroup')
        return {process.pid: process.cgroup if process.cgroup and self._is_users(process.cgroup, own) else fallback
                for process in processes}

    def _callers_cgroup(self) -> str:
        """Return the cgroup of the calling process at the time of its call."""
        caller = self._job.request.caller
        if own := self._identity.bounds.cgroup:
            return own
        try:
            with held(caller.pid, caller.start_time):
                return read_cgroup2(caller.pid)
        except (ProcessLookupError, FileNotFoundError):
            return ''

    def _is_users(self, name: str, own: str) -> bool:
        """Whether a cgroup exists and the user's own processes may be in it."""
        if '..' in name.split('/') or not name.startswith('/'):
            return False
        group = self._existing(name)
        if group is None:
            return False
        uid, gid, groups = self._identity[:3]
        with file_rights(uid, gid, groups):
            is_delegated = os.access(f'{group.path}/cgroup.procs', os.W_OK, effective_ids=True)
        return is_delegated or (bool(own) and is_below(name, own)) or f'/user-{uid}.slice/' in f'{name}/'

    @staticmethod
    def _existing(name: str) -> Cgroup | None:
        try:
            group = Cgroup(find_mount().directory(name))
        except FileNotFoundError:
            return None
        return group if group.exists else None
