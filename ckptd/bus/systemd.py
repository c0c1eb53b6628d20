# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.freedesktop.systemd1: what ckptd asks of the service manager, org.freedesktop.systemd1(5)."""

from typing import Final

from ckptd.bus.client import Client
from ckptd.errors import CkptError, Unavailable

SERVICE: Final = 'org.freedesktop.systemd1'
PATH: Final = '/org/freedesktop/systemd1'
MANAGER: Final = 'org.freedesktop.systemd1.Manager'


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
        """Freeze a unit; done when the kernel has confirmed. NoSuchTarget, NotSupported, PermissionDenied."""
        await self._manager('FreezeUnit', unit, timeout)

    async def thaw(self, unit: str, timeout: float = 25) -> None:  # noqa: ASYNC109 - of the call
        await self._manager('ThawUnit', unit, timeout)

    async def _manager(self, method: str, unit: str, timeout: float = 25) -> object:  # noqa: ASYNC109 - of the call
        try:
            return await self._client.call(SERVICE, PATH, MANAGER, method, 's', unit, timeout=timeout)
        except CkptError as error:
            error.resource = error.resource or f'unit {unit}'
            raise
