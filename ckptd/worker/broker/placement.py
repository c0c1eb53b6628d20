# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the processes of a user's restored tree live, and that all of them run or none.

The worker makes them where it is itself. The broker moves them, stopped, into a frozen cgroup of its own; when the
worker has let go of all of them it thaws that, in one write. A tree whose worker dies before is ended.

A process goes back to the cgroup that it was in, where that is the user's: below the user's slice or the calling
process's cgroup, or delegated to the user. Else systemd makes a scope in the user's slice; without a systemd it goes to
the cgroup of the calling process. What the image says is the user's word and can never lead to a cgroup of others.
"""

import os
from collections.abc import Sequence

from ckptd.errors import CkptError, PermissionDenied
from ckptd.freezer.groups import is_below
from ckptd.journal.steps import KeepFile, MakeFile, MakeSegment
from ckptd.kernel.cgroup import Cgroup, find_mount
from ckptd.kernel.creds import file_rights
from ckptd.kernel.pidfd import held
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2
from ckptd.operation.context import JobContext
from ckptd.protocol.broker_calls import Placed
from ckptd.restore.cgroups import BirthCgroup
from ckptd.worker.broker.identity import Identity


class TreePlace:
    """The place of one tree, and the journal of what the worker makes for it."""

    def __init__(self, job: JobContext, identity: Identity, worker: int) -> None:
        self._job, self._identity, self._worker = job, identity, worker
        self._place: BirthCgroup | None = None
        self._is_settled = False

    def note(self, step: MakeFile | KeepFile | MakeSegment) -> None:
        """Write a step of the worker's down. CkptError if the journal cannot be written."""
        self._birth_cgroup().note(step)

    def keep_content(self) -> tuple[str, int]:
        """As BirthCgroup has it."""
        return self._birth_cgroup().keep_content()

    def settle(self, processes: Sequence[Placed]) -> None:
        """Put stopped processes where they start, frozen. PermissionDenied for what is no stub of the worker's."""
        if self._is_settled or not processes:
            raise PermissionDenied('the tree has its place already, or has no process')
        self._is_settled = True
        # /proc of the worker shows other start times, if it is in a time namespace
        born = {process.pid: self._require_stub(process.pid) for process in processes}
        homes = self._homes(processes)
        place = self._birth_cgroup()
        place.want(homes, None if all(homes.values()) else f'user-{self._identity.uid}.slice')
        place.prepare()
        place.settle({process.pid: process.pid for process in processes})
        if any(self._require_stub(pid) != start_time for pid, start_time in born.items()):
            raise PermissionDenied('a process of this restart has died, and another one has its pid')

    def start(self) -> list[str]:
        """The worker has let go of all: from here on the tree lives. Warnings, one sentence each."""
        if self._place is None or not self._is_settled:
            raise PermissionDenied('the tree has no place yet')
        self._place.lift_barrier()
        return [warning.reason for warning in self._place.warnings]

    def close(self) -> None:
        """End a tree that does not live yet, and undo what was noted for it."""
        if self._place is not None:
            self._place.__exit__(None, None, None)

    def _birth_cgroup(self) -> BirthCgroup:
        if self._place is None:
            self._place = BirthCgroup(self._job)
        return self._place

    def _require_stub(self, pid: int) -> int:
        """When it began. It is traced by the worker, younger than it, the user's, and has no right that they lack."""
        try:
            stat, status = read_stat(pid), read_status(pid)
            is_stub = (stat.start_time >= read_stat(self._worker).start_time and status.tracer_pid == self._worker
                       and {*status.uids} == {self._identity.uid}
                       and not status.cap_prm | status.cap_inh | status.cap_amb)
        except ProcessLookupError:
            raise CkptError(f'process {pid} died while it was restored', task=pid) from None
        if not is_stub:
            raise PermissionDenied(f'process {pid} is no stub of this restart', task=pid)
        return stat.start_time

    # ------------------------------------------------------------ homes

    def _homes(self, processes: Sequence[Placed]) -> dict[int, str]:
        """A cgroup by pid; '' where systemd is to make a scope."""
        own = self._callers_cgroup()
        fallback = '' if self._job.request.systemd else own
        asked = self._job.request.cgroup
        if asked and self._job.request.caller.uid and not self._is_users(asked, own):
            raise PermissionDenied(f'the caller may not put processes into cgroup {asked}', resource=asked,
                                   hint='name one that may be written with --cgroup')
        return {process.pid: process.cgroup if process.cgroup and self._is_users(process.cgroup, own) else fallback
                for process in processes}

    def _callers_cgroup(self) -> str:
        """That of the calling process, when it called."""
        caller = self._job.request.caller
        if own := self._identity.bounds.cgroup:
            return own
        try:
            with held(caller.pid, caller.start_time):
                return read_cgroup2(caller.pid)
        except (ProcessLookupError, FileNotFoundError):
            return ''

    def _is_users(self, name: str, own: str) -> bool:
        """Whether a cgroup is there and the user's own processes may be in it."""
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
