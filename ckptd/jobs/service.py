# SPDX-License-Identifier: LGPL-2.1-or-later
"""Workers that are services of systemd. They are not children of the daemon and inherit none of its restrictions.

    daemon                            systemd                          worker
    socketpair, StartTransientUnit -> ckptd-restore-XXXX.service   -> python -m ckptd.worker.main 0
    Follow, Start, Cancel, ... over the socket, which is the worker's standard input; end-of-file as with a child

systemd keeps the worker's end of the socket open for as long as the service exists, so the daemon notices a worker's
death by its pidfd.
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

# Variables that are passed on: ckptd's own settings. The others belong to the daemon's unit.
KEPT = ('PYTHONPATH', 'CKPTD_')


@dataclass(frozen=True, slots=True)
class Service:
    """A transient service."""
    unit: str
    description: str
    command: tuple[str, ...]          # the program and its arguments
    environment: Mapping[str, str]    # variables added to its environment
    stdin: int                        # fd that becomes its standard input
    slice: str = ''                   # '' for the manager's default


class Services(Protocol):
    """A systemd manager. CkptError if it refuses."""

    async def start_service(self, service: Service) -> None:
        """Start a service. Return when its program runs. The service stays known until `exit_status` is called."""

    async def main_pid(self, unit: str) -> int:
        """Return the service's process, or 0 if it has ended."""

    async def exit_status(self, unit: str) -> int:
        """Return the exit status, as in subprocess, of the service's process, which has ended or is about to. The
        service is then forgotten."""


class ServiceWorker(WorkerHandle):
    """A worker that systemd started."""

    def __init__(self, sock: socket.socket, pid: int, pidfd: int, unit: str, services: Services) -> None:
        super().__init__(sock, pid, pidfd)
        self._unit, self._services = unit, services

    @classmethod
    async def start(cls, services: Services, description: str, command: Sequence[str] = COMMAND,
                    liveness: int = -1, slice_: str = '') -> Self:
        """Start a worker. liveness: as for `socket_pair`. WorkerDied, with systemd's message, if it cannot be
        started."""
        # A job number does not suffice, since each daemon begins with 1 again.
        unit = f'ckptd-restore-{secrets.token_hex(4)}.service'
        kept = {name: value for name, value in environment().items() if name.startswith(KEPT)}
        ours, theirs = socket_pair(liveness)
        try:
            with theirs:
                await services.start_service(Service(unit, description, (*command, '0'), kept, theirs.fileno(), slice_))
            pid, pidfd = await _open_main(services, unit)
        except CkptError as error:
            ours.close()
            raise WorkerDied(f'systemd cannot start a worker: {error.message}', errno=error.errno,
                             hint=f'journalctl -u {unit} may say more') from error
        except BaseException:
            ours.close()
            raise
        return cls(ours, pid, pidfd, unit, services)

    async def _status(self) -> int:
        try:
            return await self._services.exit_status(self._unit)
        except CkptError as error:
            # the worker's messages count; this is only about the way it ended
            log.warning('the exit status of %s is unknown: %s', self._unit, error)
            return 0


async def _open_main(services: Services, unit: str) -> tuple[int, int]:
    """Return pid and pidfd of the service's process. The pid is checked again after the pidfd was opened."""
    if pid := await services.main_pid(unit):
        with contextlib.ExitStack() as undo, contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            undo.callback(os.close, pidfd)
            if await services.main_pid(unit) == pid:
                undo.pop_all()
                return pid, pidfd
    raise WorkerDied(f'{unit} {WorkerHandle.describe(await services.exit_status(unit))} before it began')
