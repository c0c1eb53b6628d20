# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.freedesktop.systemd1: calls of ckptd to the service manager (org.freedesktop.systemd1(5))."""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from ckptd.bus.client import Client, Signals
from ckptd.bus.connection import PROPERTIES
from ckptd.bus.message import UnixFd
from ckptd.bus.values import to_variant
from ckptd.errors import CkptError, NoSuchTarget, Unavailable
from ckptd.jobs.service import Service
from ckptd.protocol.requests import UnitFacts

log = logging.getLogger(__name__)

SERVICE: Final = 'org.freedesktop.systemd1'
PATH: Final = '/org/freedesktop/systemd1'
MANAGER: Final = 'org.freedesktop.systemd1.Manager'
UNIT: Final = 'org.freedesktop.systemd1.Unit'
JOB: Final = 'org.freedesktop.systemd1.Job'
UNIT_SERVICE: Final = 'org.freedesktop.systemd1.Service'
START_TIMEOUT: Final = 25.0     # seconds for a unit to start, whose program waits for nothing
EXIT_TIMEOUT: Final = 10.0      # seconds until systemd has seen a death
STOPPING: Final = 'deactivating'
STOPPED: Final = ('inactive', 'failed')
INFINITY: Final = 2**64 - 1     # USEC_INFINITY of systemd's src/basic/time-util.h
ENDING: Final = (STOPPING, *STOPPED)

# systemd.service(5), .exec(5), .kill(5), .unit(5). No sandbox, and no limit that the restored tree did not have.
# KillMode=process: the tree outlives the worker that made it. AddRef: the unit stays known until ckptd has asked for
# its exit status, or has left the bus.
TRANSIENT: Final[Mapping[str, tuple[str, Any]]] = {
    'Type': ('s', 'exec'), 'KillMode': ('s', 'process'), 'CollectMode': ('s', 'inactive-or-failed'),
    'AddRef': ('b', True), 'StandardOutput': ('s', 'null'), 'StandardError': ('s', 'journal'),
    'LimitNOFILE': ('t', 524288), 'TasksMax': ('t', 2**64 - 1),
    # a private session keyring would separate a user's worker from the user's own keys
    'KeyringMode': ('s', 'shared'),
}
SCOPE: Final[Mapping[str, tuple[str, Any]]] = {
    'Delegate': ('b', True), 'CollectMode': ('s', 'inactive-or-failed'), 'TasksMax': ('t', 2**64 - 1),
}


class Systemd:
    """The manager on a client's bus: PID 1 on the system bus, the user manager on the session bus."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def is_there(self) -> bool:
        """Whether a systemd answers on this bus."""
        try:
            return bool(await self._client.owner(SERVICE))
        except Unavailable:
            return False

    async def freeze(self, unit: str, timeout: float) -> None:  # noqa: ASYNC109 - of the call
        """Freeze a unit. Return when the kernel has confirmed. NoSuchTarget, NotSupported, PermissionDenied."""
        await self._manager('FreezeUnit', unit, timeout)

    async def thaw(self, unit: str, timeout: float = 25) -> None:  # noqa: ASYNC109 - of the call
        """Thaw a unit. A unit that is gone, or that systemd has thawed to stop it, is thawed."""
        try:
            await self._manager('ThawUnit', unit, timeout)
        except CkptError as error:
            if not isinstance(error, NoSuchTarget) and await self._property(unit, 'FreezerState') != 'running':
                raise

    async def stop(self, unit: str, timeout: float) -> bool:  # noqa: ASYNC109 - of the beginning
        """Stop a unit. Return when its processes have been told. False if it was being stopped already.

        A job that has not begun by then, because units that need this one stop before it, is cancelled: CkptError.
        """
        async with self._watching(unit) as changes:
            if await self._property(unit, 'ActiveState') == STOPPING:
                return False
            job = str(await self._manager('StopUnit', unit, more=('fail',)))
            try:
                async with asyncio.timeout(timeout):
                    while await self._property(unit, 'ActiveState') not in ENDING:
                        await anext(changes)
            except TimeoutError:
                await self._client.call(SERVICE, job, JOB, 'Cancel')
                raise CkptError(f'the stop of {unit} did not begin within {timeout:.0f} s', resource=f'unit {unit}',
                                hint='stop the units that need it first: systemctl list-dependencies --reverse '
                                     f'{unit}') from None
        return True

    async def await_stop(self, unit: str) -> None:
        """Wait until a unit that is being stopped is inactive. Do not wait for long: what is left of it, as its
        ExecStopPost=, is not our work."""
        try:
            async with asyncio.timeout(EXIT_TIMEOUT), self._watching(unit) as changes:
                while (state := await self._property(unit, 'ActiveState')) not in STOPPED:
                    await anext(changes)
                if state != STOPPED[0]:
                    log.warning('%s was stopped, and systemd calls it %s', unit, state)
        except TimeoutError:
            log.warning('%s is still being stopped after %.0f s', unit, EXIT_TIMEOUT)
        except NoSuchTarget:        # it was transient
            return

    async def await_end(self, unit: str) -> None:
        """Wait until something begins to stop a unit, or it has ended."""
        async with self._watching(unit) as changes:
            while await self._property(unit, 'ActiveState') not in ENDING:
                await anext(changes)

    async def _property(self, unit: str, name: str) -> str:
        return str(await self._client.property_(SERVICE, unit_path(unit), UNIT, name))

    @contextlib.asynccontextmanager
    async def _watching(self, unit: str) -> AsyncIterator[Signals]:
        """Receive the changes of a unit. systemd sends them for units that somebody refers to."""
        async with self._client.signals(SERVICE, unit_path(unit), PROPERTIES, 'PropertiesChanged') as changes:
            await self._manager('RefUnit', unit)
            try:
                yield changes
            finally:
                await self._manager('UnrefUnit', unit)

    async def facts(self, unit: str) -> UnitFacts:
        """Return what systemd knows of a unit that is to be frozen. CkptError."""
        if not unit.endswith('.service'):
            return UnitFacts()
        main, watchdog, control = [
            int(await self._client.property_(SERVICE, unit_path(unit), UNIT_SERVICE, name))
            for name in ('MainPID', 'WatchdogUSec', 'ControlPID')]
        return UnitFacts(main, watchdog if main and watchdog != INFINITY else 0, control)

    async def scope(self, scope: str, pids: Sequence[int], description: str, slice_: str = '') -> None:
        """Put these processes into a new scope, in the given slice if any. Return when they are in it."""
        where = {'Slice': ('s', slice_)} if slice_ else {}
        await self._start(scope, {**SCOPE, **where, 'Description': ('s', description), 'PIDs': ('au', list(pids))})

    async def start_service(self, service: Service) -> None:
        """Start a program without a sandbox. Return when it has been executed. The unit is kept until `exit_status` is
        called."""
        command = (service.command[0], list(service.command), False)
        environment = [f'{name}={value}' for name, value in service.environment.items()]
        where = {'Slice': ('s', service.slice)} if service.slice else {}
        await self._start(service.unit, {
            **TRANSIENT, **where, 'Description': ('s', service.description), 'ExecStart': ('a(sasb)', [command]),
            'Environment': ('as', environment), 'StandardInputFileDescriptor': ('h', UnixFd(service.stdin))})

    async def main_pid(self, unit: str) -> int:
        return int(await self._client.property_(SERVICE, unit_path(unit), UNIT_SERVICE, 'MainPID'))

    async def exit_status(self, unit: str) -> int:
        """Return the exit status of a service's process once systemd has reaped it; negative for a signal."""
        path = unit_path(unit)
        try:
            async with asyncio.timeout(EXIT_TIMEOUT), \
                    self._client.signals(SERVICE, path, PROPERTIES, 'PropertiesChanged') as signals:
                while not (code := await self._client.property_(SERVICE, path, UNIT_SERVICE, 'ExecMainCode')):
                    await anext(signals)
        except TimeoutError:
            raise CkptError(f'systemd does not see the end of {unit}', resource=f'unit {unit}') from None
        status = int(await self._client.property_(SERVICE, path, UNIT_SERVICE, 'ExecMainStatus'))
        await self._manager('UnrefUnit', unit)
        return status if code == os.CLD_EXITED else -status

    async def _start(self, unit: str, properties: Mapping[str, tuple[str, Any]]) -> None:
        """Make a transient unit and wait for the end of its start job, which has the result."""
        rows = [(name, to_variant(value, kind) if kind != 'h' else value) for name, (kind, value) in properties.items()]
        try:
            async with asyncio.timeout(START_TIMEOUT), \
                    self._client.signals(SERVICE, PATH, MANAGER, 'JobRemoved') as signals:
                job = await self._client.call(SERVICE, PATH, MANAGER, 'StartTransientUnit', 'ssa(sv)a(sa(sv))', unit,
                                              'fail', rows, [])
                while (signal := await anext(signals)).args[1] != job:
                    continue
        except TimeoutError:
            raise CkptError(f'{unit} did not start within {START_TIMEOUT:.0f} s', resource=f'unit {unit}') from None
        except CkptError as error:
            error.resource = error.resource or f'unit {unit}'
            raise
        if signal.args[3] != 'done':
            raise CkptError(f'{unit} did not start: {signal.args[3]}', resource=f'unit {unit}')

    async def _manager(self, method: str, unit: str, timeout: float = 25, *,  # noqa: ASYNC109 - of the call
                       more: tuple[str, ...] = ()) -> object:
        try:
            return await self._client.call(SERVICE, PATH, MANAGER, method, 's' * (1 + len(more)), unit, *more,
                                           timeout=timeout)
        except CkptError as error:
            error.resource = error.resource or f'unit {unit}'
            raise


def unit_path(unit: str) -> str:
    """Return the path of a unit's object. Bytes that a path cannot have become hex codes (sd_bus_path_encode(3))."""
    name = re.sub(r'[^A-Za-z0-9]', lambda match: f'_{ord(match[0]):02x}', unit)
    return f'{PATH}/unit/{name}'
