# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job as its worker sees it: the request, the connection to the daemon, and the target's tree."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from ckptd.errors import SECCOMP, Finding, NoSuchImage, NoSuchTarget, Refused, SpoolFailed
from ckptd.external import Policies
from ckptd.faults import fault
from ckptd.freezer import FrozenTree, freeze
from ckptd.freezer.base import FreezeRequest, refuse_own_tree
from ckptd.image.archive.unpack import destination_in
from ckptd.image.files import require_room, spooling
from ckptd.image.ids import is_image_id
from ckptd.image.manifest import Manifest
from ckptd.image.source import DirectoryFiles, ImageFiles
from ckptd.image.writer import Destination, Incoming
from ckptd.inspect.checks import check_rights, check_tree, told_dead
from ckptd.inspect.checks.hidden import require_visibility, without_hidden
from ckptd.inspect.proc_cache import ProcCache
from ckptd.inspect.scan import ResolvedTarget, is_alive, resolve_target, scan_tree
from ckptd.journal.owner import StepJournal
from ckptd.journal.steps import LinkFile, RepairSockets, StepContext, TakeStep, WalkQueues
from ckptd.journal.store import Journal
from ckptd.kernel.cgroup import mount_of
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.netlink import unix_sockets
from ckptd.kernel.pidfd import held, pidfd_pid
from ckptd.kernel.unix import clients_beside
from ckptd.operation.broker import BrokerClient
from ckptd.operation.freezing import lent_freeze
from ckptd.operation.timers import OwnTimers, Timers
from ckptd.protocol.channel import Channel
from ckptd.protocol.messages import UnitAction
from ckptd.protocol.requests import (
    CheckpointRequest,
    DumpRequest,
    FreezerRequest,
    ImageRequest,
    ImportRequest,
    JobRequest,
    TreeRequest,
)
from ckptd.sysv import parse_name
from ckptd.target import ProcessTarget
from ckptd.tree import Tree

_LOOKING = 1.0              # seconds in which a running tree is looked at again
_PAUSE = 0.01               # seconds between two looks
LEAST_ROOM = 16 << 20       # bytes; a spool with less free space accepts no image


R_co = TypeVar('R_co', bound=JobRequest, covariant=True)
R = TypeVar('R', bound=JobRequest)


class TooConfined(Exception):
    """The worker inherits a sandbox of the daemon, in which the tree cannot be dumped."""


@dataclass(frozen=True, slots=True)
class JobContext(Generic[R_co]):
    """The context of a job. A function names the request that it needs: JobContext[CheckpointRequest]."""
    request: R_co
    channel: Channel
    fd: int = -1        # the fd that came with the request (protocol/requests.py), else -1
    inherited: tuple[int, ...] = ()     # the fds of RestartRequest.inherit

    def narrowed(self, kind: type[R]) -> 'JobContext[R] | None':
        """Return this job if it has a request of that kind, else None."""
        return (JobContext(self.request, self.channel, self.fd, self.inherited) if isinstance(self.request, kind)
                else None)

    def resolve(self: 'JobContext[TreeRequest]') -> ResolvedTarget:
        """Resolve the target now. NoSuchTarget also if the pidfd's process has died and its pid was reused."""
        target, caller = self.request.target, self.request.caller
        if self.fd >= 0:
            pid = pidfd_pid(self.fd)
            if pid < 0:
                raise NoSuchTarget('the process of the pidfd is dead', phase='resolve')
            target = ProcessTarget(pid)
        if isinstance(target, ProcessTarget):
            require_visibility(target.pid, caller)
        # the request was made to root's service, and this worker of a user is not the user's own service
        freezing = self.narrowed(FreezerRequest)
        found = resolve_target(target, 0 if self.request.brokered else None,
                               freezing.request.unit.control_pid if freezing else 0)
        if self.request.start_time and isinstance(target, ProcessTarget):
            try:
                with held(target.pid, self.request.start_time):
                    pass
            except ProcessLookupError:
                raise NoSuchTarget(f'{found.description} is another process: the requested one has ended',
                                   phase='resolve') from None
        return found

    def scan(self: 'JobContext[TreeRequest]') -> Tree:
        """Resolve and scan. A cgroup may have got further roots since the last time."""
        return scan_tree(self.resolve().roots)

    def look(self: 'JobContext[TreeRequest]') -> Tree:
        """Scan the tree as far as the caller sees it. NoSuchTarget if that is nothing."""
        target = self.resolve()
        tree = without_hidden(scan_tree(target.roots), self.request.caller)
        if not len(tree):
            raise NoSuchTarget(f'{target.description} has no processes')
        return tree

    def cache(self: 'JobContext[DumpRequest]', *, at_rest: bool = False) -> ProcCache:
        """Make an empty cache of /proc. For a request of the caller about itself, its connections to our bus count as
        disconnected."""
        severed: Collection[int] = ()
        if self.request.sever:
            with suppress(OSError):     # without sock_diag: they are refused like any socket
                severed = clients_beside(self.request.sever, unix_sockets())
        cache = ProcCache(severed, self.request.caller, at_rest=at_rest)
        tables = cache.kinds.tables
        tables.is_at_rest = at_rest
        tables.is_taken = isinstance(self.request, CheckpointRequest) and self.request.after == 'kill'
        tables.external = Policies.parse(self.request.external)
        cache.sysv = tuple(map(parse_name, self.request.sysv))
        if self.request.brokered:
            tables.has_handles, tables.watched_paths = True, BrokerClient(self.channel).watched_paths
        return cache

    def refusals(self: 'JobContext[DumpRequest]', tree: Tree, cache: ProcCache | None = None) -> list[Finding]:
        """List all refusals and warnings. cache: of a frozen tree, whose contents are reused; PTRACE_SEIZE then decides
        about tracing."""
        rows = check_tree(tree, self.request.caller, frozen_required=self.request.freeze == 'caller',
                          avoid=self._avoid, cache=cache or self.cache(),
                          trace=cache is None and not self.request.trace_under_yama)
        if self.request.may_move and any(row.resource == SECCOMP and row.severity == 'refusal' for row in rows):
            raise TooConfined
        return rows

    def look_for_refusals(self: 'JobContext[DumpRequest]', roots: Sequence[int]) -> tuple[Tree, list[Finding]]:
        """Scan a running tree, and list its refusals and warnings.

        Tasks that are born and die meanwhile cause EAGAIN, so look again while there is nothing else in the way. What
        remains is reported, but for tasks that have died: a checkpoint is not refused for them either.
        """
        end = time.monotonic() + _LOOKING
        while True:
            tree = scan_tree(roots)
            rows = self.refusals(tree)
            refusals = [row for row in rows if row.severity == 'refusal']
            if not refusals or any(row.errno != 'EAGAIN' for row in refusals) or time.monotonic() >= end:
                return tree, [row for row in rows if row.pid not in tree or is_alive(tree[row.pid])]
            self.channel.check()
            time.sleep(_PAUSE)      # a parent in vfork(2) gives no event that a stranger could wait for

    def require_running(self: 'JobContext[DumpRequest]', roots: Sequence[int]) -> Tree:
        """Scan a running tree and check that it can be dumped. Refused, PermissionDenied and so on."""
        tree, rows = self.look_for_refusals(roots)
        self._warnings([self._weigh(row) for row in rows])
        return tree

    def require(self: 'JobContext[DumpRequest]', tree: Tree, cache: ProcCache) -> list[Finding]:
        """Return the warnings about a tree at rest. If there is any refusal, raise Refused, PermissionDenied and so on
        with all of them."""
        return self._warnings([self._weigh(row) for row in self.refusals(tree, cache)])

    def _weigh(self: 'JobContext[DumpRequest]', row: Finding) -> Finding:
        """A tree that is to be killed must be able to come back, unless the caller forces the checkpoint."""
        request = self.request
        is_final = isinstance(request, CheckpointRequest) and request.after == 'kill' and not request.force
        return replace(row, severity='refusal') if row.severity == 'unrestorable' and is_final else row

    def require_access(self: 'JobContext[FreezerRequest]', tree: Tree) -> None:
        """Check only what a freeze needs: the caller's right to these tasks."""
        self._warnings(told_dead(tree, check_rights(tree, self.request.caller, self._avoid)))

    @property
    def _avoid(self: 'JobContext[FreezerRequest]') -> set[int]:
        return {os.getpid(), *self.request.avoid}

    def _warnings(self, rows: list[Finding]) -> list[Finding]:
        refusals = [row for row in rows if row.severity == 'refusal']
        if refusals:
            raise Refused.because(refusals, self.channel.phase_name)
        return rows

    def frozen(self: 'JobContext[FreezerRequest]', target: ResolvedTarget, tree: Tree, *, remote_calls: bool,
               traced: bool = True) -> FrozenTree:
        """Freeze the tree in the way that the request asks for, and return it, for `with`. traced: ptrace may be used
        if needed."""
        request, channel = self.request, self.channel

        def unit_call(action: UnitAction) -> Callable[[str], None] | None:
            return (lambda unit: channel.unit(unit, action)) if request.systemd else None

        deadline = time.monotonic() + request.timeout_usec / 1e6
        if request.brokered:
            refuse_own_tree(tree)
            freeze_request = FreezeRequest(target, deadline, None, StepContext(mount_of(read_mountinfo())), self.scan,
                                           request.job,
                                           channel.fileno(), channel.check, remote_calls, fault)
            return lent_freeze(tree, freeze_request, request.freeze, channel)
        return freeze(tree, target, request.freeze, deadline, Journal(Path(request.runtime)), self.scan,
                      job=request.job, freeze_unit=unit_call('freeze'), thaw_unit=unit_call('thaw'),
                      also=channel.fileno(), check=channel.check, remote_calls=remote_calls, traced=traced, at=fault)

    def stop_unit(self: 'JobContext[CheckpointRequest]') -> None:
        """Have the unit that is the tree stopped by its manager. Return when the stop has begun. CkptError if the
        manager refuses, and nothing has changed."""
        if self.request.brokered:
            BrokerClient(self.channel).stop_unit()
        else:
            self.channel.unit(str(self.request.target), 'stop')

    @contextmanager
    def walking(self: 'JobContext[CheckpointRequest]', step: WalkQueues) -> Iterator[None]:
        """Have the old offsets set by a recovery if this worker dies in the block, which sets them itself."""
        if self.request.brokered:
            with BrokerClient(self.channel).walking(step):
                yield
            return
        with ExitStack() as stack:
            # an entry of its own: it is undone before the tree runs, and the other one by the user
            noted: list[WalkQueues | RepairSockets] = [step]
            if os.geteuid() == 0:
                noted.append(RepairSockets(step.holders))
            for one in noted:
                journal = self._steps(one.point)
                stack.callback(journal.finish)
                journal.note(one)
            yield

    @contextmanager
    def taking(self: 'JobContext[CheckpointRequest]') -> Iterator[Callable[[TakeStep], None]]:
        """The journal of what is taken out of a tree that is killed. It is put back unless the block ends normally."""
        if self.request.brokered:
            with BrokerClient(self.channel).taking() as note:
                yield note
            return
        with self._steps('take') as journal:
            yield journal.note
            journal.finish()

    def _steps(self: 'JobContext[CheckpointRequest]', mode: str) -> StepJournal:
        request = self.request
        return StepJournal(Journal(Path(request.runtime)), request.job, request.about, mode, fault)

    def timers(self) -> Timers:
        """Return access to the timers of the machine, which only root may read."""
        return BrokerClient(self.channel).timers() if self.request.brokered else OwnTimers()

    # ------------------------------------------------------------ images

    def destination(self: 'JobContext[CheckpointRequest]') -> Destination:
        """Open the destination of the image that the job writes. SpoolFailed, also when the spool is nearly full."""
        if self.request.brokered:
            return BrokerClient(self.channel).new_image(self.request.image)
        spool = Path(self.request.spool)
        require_some_room(spool, self.request.keep_free)
        return Incoming(spool, self.request.image)

    @contextmanager
    def names(self: 'JobContext[CheckpointRequest]') -> Iterator['Names']:
        """The journal of names that the image needs. Without `keep` they are gone at the end of the block."""
        request = self.request
        if request.brokered:        # the broker knows whether it has published the image
            yield Names(BrokerClient(self.channel).note, '/', lambda: None)
            return
        with self._steps('names') as journal:
            yield Names(journal.note, str(Path(request.spool) / request.image), journal.finish)

    def import_destination(self: 'JobContext[ImportRequest]', manifest: Manifest) -> Destination:
        """Open the destination of an image that arrives as a stream. SpoolFailed, also when it does not fit."""
        request = self.request
        if request.brokered:
            return BrokerClient(self.channel).new_image(manifest.image, manifest.size)
        # root, or the user of a user's own ckptd, may know of all images in the spool
        return destination_in(Path(request.spool), request.keep_free,
                              keep_id=request.caller.uid in (0, os.geteuid()))(manifest)

    @contextmanager
    def image_files(self: 'JobContext[ImageRequest]') -> Iterator[ImageFiles]:
        """Open the files of the image that the job is about. NoSuchImage, ImageDamaged."""
        files = BrokerClient(self.channel).open_image() if self.request.brokered else DirectoryFiles(image_path(self))
        try:
            yield files
        finally:
            files.close()


class Names(NamedTuple):
    """The journal of names that a checkpoint gives to deleted files."""
    note: Callable[[LinkFile], None]    # write a name down before it is made
    image: str                          # directory of the image, once it is published
    keep: Callable[[], None]            # the image is published: the names stay


def require_some_room(spool: Path, keep_free: int) -> None:
    """Check that the spool has room for an image at all. SpoolFailed."""
    with spooling(spool):
        at = os.statvfs(spool)
    free = at.f_bavail * at.f_frsize
    if free < LEAST_ROOM:
        raise SpoolFailed(f'{spool} has only {free >> 20} MiB free', resource=str(spool), phase='scan')
    require_room(spool, LEAST_ROOM, keep_free, phase='scan')


def image_path(job: JobContext[ImageRequest]) -> Path:
    """Return the directory of the image that the job is about. NoSuchImage."""
    path = Path(job.request.spool) / job.request.image
    if not is_image_id(job.request.image) or not path.is_dir():
        raise NoSuchImage(f'no image {job.request.image!r}')
    return path
