# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the request for a worker from a caller's call."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ckptd.config import INFINITY, Config
from ckptd.errors import NoSuchTarget
from ckptd.image.ids import new_image_id
from ckptd.jobs.quota import Quota
from ckptd.jobs.spool import Spool, SpooledImage
from ckptd.kernel.bounds import read_bounds
from ckptd.kernel.stat import Stat, read_stat
from ckptd.protocol.messages import Caller, JobRequest, Operation
from ckptd.target import AnyTarget, CallerTarget, CgroupTarget, ProcessTarget, Target

MAX_TIMEOUT = 3600 * 1_000_000


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

    def on_target(self, operation: Operation, target: Target, caller: Caller, *, about_itself: bool = False,
                  freeze: str = 'auto', after: str = 'resume', timeout: int = 0, has_pidfd: bool = False,
                  **more: Any) -> JobRequest:
        """Make a request about live tasks. about_itself: the caller named the target as itself. more: further fields.
        NoSuchTarget, LimitsExceeded."""
        image = ''
        if operation == 'checkpoint':
            self.quota.room(caller.uid)
            image = new_image_id(command_of(target))
            more['keep_free'] = self.quota.keep_free(caller.uid)
        return self._request(operation, caller, target=target, image=image, freeze=freeze, after=after,
                             has_pidfd=has_pidfd, sever=self.bus if about_itself else 0,
                             timeout_usec=timeout or min(self.config.freeze_timeout_usec, MAX_TIMEOUT), **more)

    def on_image(self, operation: Operation, image: SpooledImage, caller: Caller, **more: Any) -> JobRequest:
        """Make a request about an existing image. The caller's rights are checked elsewhere."""
        if operation == 'restore':      # the undo of a restore keeps copies of changed files in the spool
            more['keep_free'] = self.quota.keep_free(caller.uid)
        return self._request(operation, caller, dumped=image.target, image=image.id, stall_usec=self._stall_usec,
                             **more)

    def _request(self, operation: Operation, caller: Caller, **more: Any) -> JobRequest:
        client = (self.client,) if self.client and self.client == caller.pid else ()
        caller = _with_bounds(caller)
        return JobRequest(operation, caller, str(self.spool.directory), str(self.runtime),
                          avoid=(*self.avoid, *client), systemd=self.systemd, **more)

    def on_stream(self, caller: Caller) -> JobRequest:
        """Make a request to import an image from a stream. LimitsExceeded."""
        return self._request('import', caller, has_output=True, save_limit=self.quota.room(caller.uid),
                             keep_free=self.quota.keep_free(caller.uid), stall_usec=self._stall_usec)

    @property
    def _stall_usec(self) -> int:
        return 0 if self.config.stream_stall_usec == INFINITY else self.config.stream_stall_usec
