# SPDX-License-Identifier: LGPL-2.1-or-later
"""What stands in the way of a restart, everything at once and before any process exists.

    image       another machine or page size, processor state that this one does not have
    files       open files by their kinds, mapped files and programs, directories
    rights      ids, capabilities, limits and priorities that the caller or ckptd cannot give
    room        memory and pids
    places      cgroup, namespaces, terminal

Rows are those of a checkpoint: pid is a vpid of the image, severity 'warning' what the tree will lack.
"""

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import suppress

from ckptd.engine.messages import JobRequest
from ckptd.engine.restore.files import Access, decode
from ckptd.engine.restore.plan import Plan
from ckptd.engine.restore.vdso import VdsoPlan
from ckptd.engine.restore.xstate import own_xstate, shortcoming
from ckptd.errors import Refusal
from ckptd.image import records
from ckptd.image.identity import MISSING, Identity, changes
from ckptd.image.reader import ImageReader
from ckptd.kernel.cgroup import find_mount
from ckptd.kernel.creds import CAP_SYS_NICE, CAP_SYS_RESOURCE, capget
from ckptd.kernel.procfs import read_file
from ckptd.kernel.status import read_status
from ckptd.kernel.task import boot_id, read_namespaces, read_oom_score_adj
from ckptd.kinds.base import Reason
from ckptd.kinds.deleted import deleted_obstacles

LIMIT_NAMES = ('CPU', 'FSIZE', 'DATA', 'STACK', 'CORE', 'RSS', 'NPROC', 'NOFILE', 'MEMLOCK', 'AS', 'LOCKS',
               'SIGPENDING', 'MSGQUEUE', 'NICE', 'RTPRIO', 'RTTIME')
_INFINITY = (1 << 64) - 1
_MADE_ANEW = ('pid', 'pid_for_children', 'time', 'time_for_children')     # namespaces that a restart makes itself
_BATCH = 3                  # SCHED_BATCH: policies up to this and SCHED_IDLE ask for no right


class Obstacles:
    """One look at an image and this machine."""

    def __init__(self, reader: ImageReader, plan: Plan, request: JobRequest, access: Access) -> None:
        self._reader, self._plan, self._request, self._access = reader, plan, request, access

    def rows(self) -> list[Refusal]:
        """All, the same row once."""
        found = [*self._plan.refusals, *self._machine(), *self._processors(), *self._files(), *self._mapped(),
                 *self._directories(), *self._credentials(), *self._limits(), *self._priorities(), *self._room(),
                 *self._places()]
        return list(dict.fromkeys(found))

    def _row(self, vpid: int, resource_: str, reason: Reason) -> Refusal:
        task = self._reader.table(records.Task).get(vpid)
        return Refusal(vpid, task.comm if task else '', resource_, *reason)

    def _tree(self, resource_: str, *reason: str, warning: bool = False) -> Refusal:
        number, text, hint = reason
        return Refusal(0, '', resource_, number, text, hint, 'warning' if warning else 'refusal')

    # ------------------------------------------------------------ image

    def _machine(self) -> Iterator[Refusal]:
        header = self._reader.header
        if header.machine != platform.machine():
            yield self._tree('architecture', 'ENOEXEC', f'the image is of {header.machine}, this is'
                             f' {platform.machine()}', 'restore it on a machine of its own kind')
        if header.page_size != resource.getpagesize():
            yield self._tree('architecture', 'ENOEXEC', f'pages of {header.page_size} bytes, here they have'
                             f' {resource.getpagesize()}', 'restore it on a machine of its own kind')

    def _processors(self) -> Iterator[Refusal]:
        own = own_xstate()
        for task in self._plan.alive:
            text = shortcoming(self._reader.get(records.Registers, task.vpid).xstate, own)
            if text:
                yield self._tree('xstate', 'EOPNOTSUPP', text, 'restore it on a processor with at least the features of'
                                 ' the one that it was dumped on')
                return
        bridged = [mm_id for mm_id in self._plan.users('mm_id')
                   if VdsoPlan(0).is_bridged(self._reader, self._reader.memory(mm_id))]
        if bridged:
            yield self._tree('vdso', 'ENOEXEC', 'the kernel is another one: calls of its vdso take a jump',
                             'nothing is lost but some nanoseconds a call', warning=True)
        yield from self._inside_vdso(set(bridged))

    def _inside_vdso(self, bridged: set[int]) -> Iterator[Refusal]:
        for task in self._plan.alive:
            if task.record.mm_id in bridged:
                rip = int.from_bytes(self._reader.get(records.Registers, task.vpid).gpr[128:136], 'little')
                memory = self._reader.memory(task.record.mm_id)
                if any(vma.kind == records.VDSO and vma.start <= rip < vma.end for vma in memory.vmas):
                    yield self._row(task.vpid, 'vdso', Reason('ENOEXEC', 'was inside the vdso of another kernel',
                                                              'restore it under the kernel that it was dumped on'))

    # ------------------------------------------------------------ files

    def _files(self) -> Iterator[Refusal]:
        holders: dict[int, tuple[int, int]] = {}
        for files_id, vpid in self._plan.users('files_id').items():
            for fd in self._reader.get(records.FdTable, files_id).fds if files_id else ():
                holders.setdefault(fd.file_id, (vpid, fd.fd))
        for saved in self._reader.every(records.OpenFile):
            vpid, number = holders.get(saved.file_id, (0, 0))
            kind, record = decode(saved)
            for reason in kind.obstacles(record, saved, self._access):
                yield self._row(vpid, f'fd {number}', reason)

    def _mapped(self) -> Iterator[Refusal]:
        users: dict[int, int] = {}
        for mm_id, vpid in self._plan.users('mm_id').items():
            memory = self._reader.memory(mm_id)
            for vma in memory.vmas:
                if vma.kind in (records.FILE_PRIVATE, records.FILE_SHARED):
                    users.setdefault(vma.object, vpid)
            users.setdefault(memory.mm.exe, vpid)
        for backing in self._reader.every(records.Backing):
            if backing.backing_id in users:
                for reason in self._backing(backing):
                    yield self._row(users[backing.backing_id], f'mapped {backing.path}', reason)

    def _backing(self, backing: records.Backing) -> Iterator[Reason]:
        if backing.deleted:
            yield from deleted_obstacles(backing.path, self._access)
            return
        if not backing.mode:
            return      # it could not be looked at when it was dumped
        found = changes(Identity.of_backing(backing), self._access.lstat(backing.path))
        severity = 'warning' if self._access.changed_files == 'accept' and found != [MISSING] else 'refusal'
        for what in found:
            yield Reason('ENOENT' if what == MISSING else 'ESTALE', f'{backing.path} {what}',
                         'put it back as it was' if what == MISSING else
                         'put it back as it was, or take it as it is: --changed-files accept',
                         'warning' if severity == 'warning' else 'refusal')

    def _directories(self) -> Iterator[Refusal]:
        for fs_id, vpid in self._plan.users('fs_id').items():
            record = self._reader.get(records.Fs, fs_id)
            for name, path in (('cwd', record.cwd), ('root', record.root)):
                if not self._access.may(path, os.X_OK):
                    yield self._row(vpid, name, Reason('ENOENT', f'{path} is gone, or not to be entered by the caller',
                                                       'make that directory again'))

    # ------------------------------------------------------------ rights

    def _credentials(self) -> Iterator[Refusal]:
        own = read_status(os.getpid())
        for task in self._plan.alive:
            record = self._reader.get(records.Credentials, task.vpid)
            text = self._beyond(record) if self._is_ordinary else ''
            if not text and record.capabilities[3] & ~own.cap_bnd and not self._plan.world.user:
                text = 'has capabilities in its bounding set that ckptd lacks'
            if text:
                yield self._row(task.vpid, 'credentials', Reason('EPERM', text, 'restore it as root'))

    @property
    def _is_ordinary(self) -> bool:
        return self._request.caller.uid != 0 or self._plan.world.user

    def _beyond(self, record: records.Credentials) -> str:
        """What somebody who is not root may not be given."""
        caller = self._request.caller
        if set(record.uids) != {caller.uid}:
            return f'has uids {sorted(set(record.uids))}, the caller is uid {caller.uid}'
        groups = {caller.gid, *(() if self._plan.world.user else caller.groups)}
        if not set(record.gids) <= groups:
            return f'has gids {sorted(set(record.gids))}, which the caller is not in'
        if not set(record.groups) <= {caller.gid, *caller.groups}:
            return f'is in groups {sorted(record.groups)}, which the caller is not in'
        inheritable, permitted, effective, _, ambient = record.capabilities
        if (inheritable | permitted | effective | ambient) & ~max(caller.capabilities, 0):
            return 'has capabilities that the caller lacks'
        return ''

    def _limits(self) -> Iterator[Refusal]:
        if capget().effective >> CAP_SYS_RESOURCE & 1:
            return
        for process in self._plan.processes:
            if not process.alive:
                continue
            for number, limit in enumerate(self._reader.get(records.Limits, process.vpid).limits):
                _, hard = resource.getrlimit(number)
                hard = _INFINITY if hard == resource.RLIM_INFINITY else hard
                if limit.hard > hard:
                    name = LIMIT_NAMES[number]
                    yield self._row(process.vpid, f'RLIMIT_{name}', Reason(
                        'EPERM', f'has a hard limit of {_limit(limit.hard)}, ckptd one of {_limit(hard)}',
                        f'raise it for ckptd (Limit{name}= of its unit, ulimit -H), or give it CAP_SYS_RESOURCE'))

    def _priorities(self) -> Iterator[Refusal]:
        effective, adj = capget().effective, read_oom_score_adj(os.getpid())
        for process in self._plan.processes:
            if process.alive and not effective >> CAP_SYS_RESOURCE & 1:
                wanted = self._reader.get(records.ProcessState, process.vpid).oom_score_adj - 1000
                if wanted < adj:
                    yield self._row(process.vpid, 'oom_score_adj', Reason(
                        'EPERM', f'has an oom_score_adj of {wanted}, ckptd one of {adj}', 'give ckptd'
                        ' CAP_SYS_RESOURCE, or OOMScoreAdjust= in its unit'))
        if effective >> CAP_SYS_NICE & 1:
            return
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        for task in self._plan.alive:
            record = self._reader.get(records.Scheduling, task.vpid)
            if record.nice - 20 < nice or record.policy in (1, 2, 6):
                yield self._row(task.vpid, 'scheduling', Reason(
                    'EPERM', f'has policy {record.policy} and nice {record.nice - 20}', 'give ckptd CAP_SYS_NICE'))

    # ------------------------------------------------------------ room and places

    def _room(self) -> Iterator[Refusal]:
        runs = {(run.part, run.offset): run.pages for one in self._reader.every(records.PageRuns) for run in one.runs}
        needed, free = sum(runs.values()) * records.PAGE, _available()
        if needed > free:
            yield self._tree('memory', 'ENOMEM', f'needs {needed >> 20} MiB, and {free >> 20} MiB are available',
                             'end other programs, or add swap')
        tasks = len(self._plan.tasks)
        most = int(read_file('/proc/sys/kernel/threads-max'))
        if tasks > most:
            yield self._tree('pids', 'EAGAIN', f'has {tasks} tasks, the system takes {most}',
                             'raise the sysctl kernel.threads-max')
        highest = max((task.vpid for task in self._plan.tasks), default=0)
        if highest >= (pid_max := int(read_file('/proc/sys/kernel/pid_max'))):
            yield self._tree('pids', 'EINVAL', f'has pid {highest}, numbers here end at {pid_max - 1}',
                             f'sysctl kernel.pid_max={highest + 1}')

    def _places(self) -> Iterator[Refusal]:
        for record in self._reader.every(records.Namespaces):
            for one in record.namespaces:
                if self._is_ours(one) or one.name in _MADE_ANEW or (one.name == 'user' and self._plan.world.user):
                    continue
                yield self._tree(f'namespace {one.name}', 'EOPNOTSUPP',
                                 f'lived in a {one.name} namespace of its own, which is not brought back',
                                 'restore it from inside such a namespace', warning=one.name in ('cgroup', 'uts'))
        asked = self._request.cgroup
        if asked:
            yield from self._cgroup(asked)

    def _is_ours(self, namespace: records.Namespace) -> bool:
        """It was that of the machine then, or on the same boot it is the one that we are in."""
        if namespace.own:
            return True
        return (self._reader.manifest.boot_id == boot_id()
                and read_namespaces(os.getpid()).get(namespace.name) == namespace.inode)

    def _cgroup(self, asked: str) -> Iterator[Refusal]:
        with suppress(FileNotFoundError):
            directory = find_mount().directory(asked)
            if self._access.lstat(str(directory)) is None:
                if not self._request.systemd and self._request.caller.uid == 0:
                    return      # it is made
            elif self._access.may(str(directory / 'cgroup.procs'), os.W_OK):
                return
            yield self._tree(f'cgroup {asked}', 'EACCES', f'{asked} is no cgroup that the caller may put processes in',
                             'name one that is there and may be written')
            return
        yield self._tree(f'cgroup {asked}', 'ENOENT', 'no cgroup v2 hierarchy shows it', 'leave out --cgroup')


def _limit(value: int) -> str:
    return 'unlimited' if value == _INFINITY else str(value)


def _available() -> int:
    """Bytes that can be had without swapping, proc_meminfo(5)."""
    lines = dict(line.split(b':', 1) for line in read_file('/proc/meminfo').splitlines())
    return int(lines[b'MemAvailable'].split()[0]) * 1024
