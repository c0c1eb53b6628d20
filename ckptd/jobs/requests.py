# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the request for a worker from a caller's call."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ckptd.config import INFINITY, Config
from ckptd.errors import InvalidArgument, NoSuchTarget
from ckptd.image.ids import new_image_id
from ckptd.jobs.quota import Quota
from ckptd.jobs.spool import Spool, SpooledImage
from ckptd.kernel.bounds import read_bounds
from ckptd.kernel.stat import Stat, read_stat
from ckptd.protocol.messages import Caller, JobRequest, Operation

MAX_TARGET = 4096       # the kernel's bound for the path of a cgroup (PATH_MAX)
UNIT = re.compile(r'[A-Za-z0-9:_.\\@-]{1,255}', re.ASCII)       # systemd.unit(5)
MAX_TIMEOUT = 3600 * 1_000_000


def parse_target(text: str, caller: Caller) -> str:
    """Parse a target into its one spelling: 'pid:12', 'cgroup:/a/b' or a unit's name. 'self' becomes the caller's
    pid."""
    kind, colon, rest = text.partition(':')
    if text == 'self':
        if not caller.pid:
            raise NoSuchTarget('the bus does not tell the pid of the caller', resource='self',
                               hint='name the process: pid:N')
        return f'pid:{caller.pid}'
    if kind == 'pid' and colon and re.fullmatch('[0-9]{1,9}', rest, re.ASCII) and int(rest) > 0:
        return f'pid:{int(rest)}'
    if kind == 'cgroup' and rest.startswith('/') and len(rest) < MAX_TARGET and '..' not in PurePosixPath(rest).parts:
        return f'cgroup:/{rest.strip("/")}'
    if kind not in ('pid', 'cgroup') and UNIT.fullmatch(text):
        return text if '.' in text else f'{text}.service'
    raise InvalidArgument(f'{text[:80]!r} is not a target', resource='target',
                          hint='a target is pid:N, a unit name, cgroup:/path or self')


def start_time_of(target: str) -> int:
    """Return the start time, in ticks since boot, of the present process pid:N; 0 for other targets. NoSuchTarget."""
    kind, _, rest = target.partition(':')
    return _stat(int(rest)).start_time if kind == 'pid' else 0


def _stat(pid: int) -> Stat:
    try:
        return read_stat(pid)
    except ProcessLookupError:
        raise NoSuchTarget(f'no process {pid}', resource=f'pid:{pid}') from None


def command_of(target: str) -> str:
    """Return a short name for an image of this target. It makes ids readable and has no other meaning."""
    kind, _, rest = target.partition(':')
    if kind == 'pid':
        return _stat(int(rest)).comm
    return PurePosixPath(rest).name if kind == 'cgroup' else target.rsplit('.', 1)[0]


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

    def on_target(self, operation: Operation, target: str, caller: Caller, *, freeze: str = 'auto',
                  after: str = 'resume', timeout: int = 0, has_pidfd: bool = False, **more: Any) -> JobRequest:
        """Make a request about live tasks. more: further fields. InvalidArgument, NoSuchTarget, LimitsExceeded."""
        where = parse_target(target, caller)
        image = ''
        if operation == 'checkpoint':
            self.quota.room(caller.uid)
            image = new_image_id(command_of(where))
            more['keep_free'] = self.quota.keep_free(caller.uid)
        return self._request(operation, where, caller, image=image, freeze=freeze, after=after, has_pidfd=has_pidfd,
                             sever=self.bus if target == 'self' else 0,
                             timeout_usec=timeout or min(self.config.freeze_timeout_usec, MAX_TIMEOUT), **more)

    def on_image(self, operation: Operation, image: SpooledImage, caller: Caller, **more: Any) -> JobRequest:
        """Make a request about an existing image. The caller's rights are checked elsewhere."""
        if operation == 'restore':      # the undo of a restore keeps copies of changed files in the spool
            more['keep_free'] = self.quota.keep_free(caller.uid)
        return self._request(operation, image.target, caller, image=image.id, stall_usec=self._stall_usec, **more)

    def _request(self, operation: Operation, target: str, caller: Caller, **more: Any) -> JobRequest:
        client = (self.client,) if self.client and self.client == caller.pid else ()
        caller = _with_bounds(caller)
        return JobRequest(operation, target, caller, str(self.spool.directory), str(self.runtime),
                          avoid=(*self.avoid, *client), systemd=self.systemd, **more)

    def on_stream(self, caller: Caller) -> JobRequest:
        """Make a request to import an image from a stream. LimitsExceeded."""
        return self._request('import', '', caller, has_output=True, save_limit=self.quota.room(caller.uid),
                             keep_free=self.quota.keep_free(caller.uid), stall_usec=self._stall_usec)

    @property
    def _stall_usec(self) -> int:
        return 0 if self.config.stream_stall_usec == INFINITY else self.config.stream_stall_usec
