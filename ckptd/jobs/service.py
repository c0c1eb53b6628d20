# SPDX-License-Identifier: LGPL-2.1-or-later
"""Workers that are services of systemd: no children of the daemon, and under nothing that it is under.

    daemon                            systemd                          worker
    socketpair, StartTransientUnit -> ckptd-restore-XXXX.service   -> python -m ckptd.worker.main 0
    Follow, Start, Cancel, ... over the socket, which is the worker's standard input; end-of-file as with a child

systemd keeps the worker's end of the socket open for as long as the service is there, so a worker's death is seen
by its pidfd.
"""

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from ckptd.errors import CkptError, WorkerDied
from ckptd.jobs.interpreter import environment
from ckptd.jobs.worker import COMMAND, WorkerHandle, socket_pair

log = logging.getLogger(__name__)

# of the daemon's environment: its own settings. The rest is of its unit, and none of the worker's business.
KEPT = ('PYTHONPATH', 'CKPTD_')


@dataclass(frozen=True, slots=True)
class Service:
    """A transient service: its program, what it finds in its environment, the fd that is its standard input, and the
    slice that it is in, '' for the manager's default."""
    unit: str
    description: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    stdin: int
    slice: str = ''


class Services(Protocol):
    """A systemd manager. CkptError when it will not."""

    async def start_service(self, service: Service) -> None:
        """Start it; done when its program runs. It stays known until `exit_status` was asked for."""

    async def main_pid(self, unit: str) -> int:
        """Its process, 0 when that has ended."""

    async def exit_status(self, unit: str) -> int:
        """Of its process, which has ended or is about to, as subprocess has it. The service is forgotten."""


class ServiceWorker(WorkerHandle):
    """A worker that systemd has started."""

    def __init__(self, sock: socket.socket, pid: int, pidfd: int, unit: str, services: Services) -> None:
        super().__init__(sock, pid, pidfd)
        self._unit, self._services = unit, services

    @classmethod
    async def start(cls, services: Services, description: str, command: Sequence[str] = COMMAND,
                    liveness: int = -1, slice_: str = '') -> Self:
        """witness: as of `socket_pair`. WorkerDied with systemd's words when there will be none."""
        # the number of the job would not do: it is one again with each daemon
        unit = f'ckptd-restore-{secrets.token_hex(4)}.service'
        kept = {name: value for name, value in environment().items() if name.startswith(KEPT)}
        ours, theirs = socket_pair(liveness)
        try:
            with theirs:
                await services.start_service(Service(unit, description, (*command, '0'), kept, theirs.fileno(), slice_))
            pid, pidfd = await _open_main(services, unit)
        except CkptError as error:
            ours.close()
            raise WorkerDied(f'systemd starts no worker: {error.message}', errno=error.errno,
                             hint=f'journalctl -u {unit} may say more') from error
        except BaseException:
            ours.close()
            raise
        return cls(ours, pid, pidfd, unit, services)

    async def _status(self) -> int:
        try:
            return await self._services.exit_status(self._unit)
        except CkptError as error:
            # what it said over its socket counts; this is about how it ended
            log.warning('how %s ended is not known: %s', self._unit, error)
            return 0


async def _open_main(services: Services, unit: str) -> tuple[int, int]:
    """Pid and pidfd of the service's process: the pid was its own before the pidfd was opened, and is after."""
    if pid := await services.main_pid(unit):
        with contextlib.ExitStack() as undo, contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            undo.callback(os.close, pidfd)
            if await services.main_pid(unit) == pid:
                undo.pop_all()
                return pid, pidfd
    raise WorkerDied(f'{unit} {WorkerHandle.describe(await services.exit_status(unit))} before it began')
