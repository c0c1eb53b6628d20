# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the request for a worker from a caller's call."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec

from ckptd.config import INFINITY, Config
from ckptd.errors import NoSuchTarget
from ckptd.image.ids import new_image_id
from ckptd.jobs.quota import Quota
from ckptd.jobs.spool import Spool, SpooledImage
from ckptd.kernel.bounds import read_bounds
from ckptd.kernel.stat import Stat, read_stat
from ckptd.protocol.requests import (
    Caller,
    CheckpointRequest,
    CheckRequest,
    CheckRestoreRequest,
    ExportRequest,
    HoldRequest,
    ImageTreeRequest,
    ImportRequest,
    RemoveNamesRequest,
    RestoreRequest,
    ScanRequest,
    TraceRequest,
    VerifyRequest,
)
from ckptd.target import CALLER, AnyTarget, CallerTarget, CgroupTarget, ProcessTarget, Target, UnitTarget

MAX_TIMEOUT = 3600 * 1_000_000
R = TypeVar('R', bound=VerifyRequest | ImageTreeRequest | RemoveNamesRequest | ExportRequest | RestoreRequest
            | CheckRestoreRequest)


def target_for(target: AnyTarget, caller: Caller) -> Target:
    """Return the tree that the caller means: for CALLER the caller's own. NoSuchTarget."""
    return target.process(caller.pid) if isinstance(target, CallerTarget) else target


def start_time_of(target: Target) -> int:
    """Return the start time, in ticks since boot, of the present process; 0 for other targets. NoSuchTarget."""
    return _stat(target).start_time if isinstance(target, ProcessTarget) else 0


def _stat(target: ProcessTarget) -> Stat:
    try:
        return read_stat(target.pid)
    except ProcessLookupError:
        raise NoSuchTarget(f'no process {target.pid}', resource=str(target)) from None


def command_of(target: Target) -> str:
    """Return a short name for an image of this target. It makes ids readable and has no other meaning."""
    match target:
        case ProcessTarget():
            return _stat(target).comm
        case CgroupTarget(path=path):
            return PurePosixPath(path).name
    return target.name.rsplit('.', 1)[0]


def _with_bounds(caller: Caller) -> Caller:
    """Add the bounds of the calling process now, because it may be gone before its job begins."""
    if not caller.uid or not caller.pid:
        return caller
    with suppress(ProcessLookupError, FileNotFoundError):
        return msgspec.structs.replace(caller, bounds=read_bounds(caller.pid, caller.start_time, caller.uid))
    return caller


@dataclass(frozen=True, slots=True)
class RequestFactory:
    """The fields that are the same in every request of this daemon."""
    config: Config
    spool: Spool
    quota: Quota
    runtime: Path
    avoid: tuple[int, ...]    # processes that no job may freeze: the daemon and its own bus
    client: int               # process that started this daemon for itself alone and waits for its answer, so it must
                              # not be frozen; or 0
    systemd: bool
    bus: int = 0              # inode of this daemon's socket to its bus

    def scan(self, target: AnyTarget, caller: Caller) -> ScanRequest:
        """Make a request to list tasks. NoSuchTarget."""
        return ScanRequest(**self._on_tree(target, caller))

    def trace(self, target: AnyTarget, caller: Caller, start_time: int) -> TraceRequest:
        """Make a request to ask a security module. NoSuchTarget."""
        return TraceRequest(**self._on_tree(target, caller), start_time=start_time)

    def check(self, target: AnyTarget, caller: Caller, **more: Any) -> CheckRequest:
        """Make a request to check a tree. more: further fields. NoSuchTarget."""
        return CheckRequest(**self._on_tree(target, caller), **self._dumped(target, caller, more), **more)

    def hold(self, target: AnyTarget, caller: Caller, *, timeout: int = 0, **more: Any) -> HoldRequest:
        """Make a request to freeze a tree. timeout: microseconds, 0 for the configured ones. more: further fields.
        NoSuchTarget."""
        return HoldRequest(**self._on_tree(target, caller, timeout), avoid=self._avoid(caller), **more)

    def checkpoint(self, target: AnyTarget, caller: Caller, *, timeout: int = 0, **more: Any) -> CheckpointRequest:
        """Make a request for an image of a tree. timeout: as for `hold`. more: further fields. NoSuchTarget,
        LimitsExceeded."""
        tree = self._on_tree(target, caller, timeout)
        self.quota.room(caller.uid)
        return CheckpointRequest(**tree, stop_unit=self.stops_unit(target, more), **self._dumped(target, caller, more),
                                 image=new_image_id(command_of(tree['target'])),
                                 keep_free=self.quota.keep_free(caller.uid), **more)

    def stops_unit(self, target: AnyTarget, options: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with these options stops its unit."""
        return (self.systemd and options.get('after') == 'kill' and isinstance(target, UnitTarget)
                and target.is_program)

    def on_image(self, kind: type[R], image: SpooledImage, caller: Caller, **more: Any) -> R:
        """Make a request about an existing image. The caller's rights are checked elsewhere. more: further fields."""
        if issubclass(kind, RestoreRequest):    # the undo of a restore keeps copies of changed files in the spool
            more['keep_free'] = self.quota.keep_free(caller.uid)
        if issubclass(kind, ExportRequest):
            more['stall_usec'] = self._stall_usec
        return kind(**self._common(caller), image=image.id, dumped=image.target, **more)

    def on_stream(self, caller: Caller) -> ImportRequest:
        """Make a request to import an image from a stream. LimitsExceeded."""
        return ImportRequest(**self._common(caller), size_limit=self.quota.room(caller.uid),
                             keep_free=self.quota.keep_free(caller.uid), stall_usec=self._stall_usec)

    # ------------------------------------------------------------ fields that several requests have

    def _common(self, caller: Caller) -> dict[str, Any]:
        return {'caller': _with_bounds(caller), 'spool': str(self.spool.directory), 'runtime': str(self.runtime),
                'systemd': self.systemd}

    def _on_tree(self, target: AnyTarget, caller: Caller, timeout: int = 0) -> dict[str, Any]:
        return {**self._common(caller), 'target': target_for(target, caller),
                'timeout_usec': timeout or min(self.config.freeze_timeout_usec, MAX_TIMEOUT)}

    def _dumped(self, target: AnyTarget, caller: Caller, more: dict[str, Any]) -> dict[str, Any]:
        """Return fields of a dump. Policies for peers and names of objects are taken out of `more`."""
        return {'avoid': self._avoid(caller), 'sever': self.bus if target == CALLER else 0,
                'external': (*self.config.external, *more.pop('external', ())), 'sysv': tuple(more.pop('sysv', ()))}

    def _avoid(self, caller: Caller) -> tuple[int, ...]:
        return (*self.avoid, self.client) if self.client and self.client == caller.pid else self.avoid

    @property
    def _stall_usec(self) -> int:
        return 0 if self.config.stream_stall_usec == INFINITY else self.config.stream_stall_usec
