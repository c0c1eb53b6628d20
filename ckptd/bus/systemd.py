# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.freedesktop.systemd1: what ckptd asks of the service manager, org.freedesktop.systemd1(5)."""

from typing import Final

from ckptd.bus.client import Client
from ckptd.errors import CkptError, Unavailable

SERVICE: Final = 'org.freedesktop.systemd1'
PATH: Final = '/org/freedesktop/systemd1'
MANAGER: Final = 'org.freedesktop.systemd1.Manager'
UNIT: Final = 'org.freedesktop.systemd1.Unit'


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

    async def unit_path(self, unit: str) -> str:
        """Object path of a loaded unit. NoSuchTarget for one that is not."""
        return str(await self._manager('GetUnit', unit))

    async def freezer_state(self, unit: str) -> str:
        """'running', 'freezing', 'frozen', 'thawing' (and since v256 'frozen-by-parent')."""
        return str(await self._client.property_(SERVICE, await self.unit_path(unit), UNIT, 'FreezerState'))

    async def control_group(self, unit: str) -> str:
        """The unit's cgroup below the mount, '' while it has none."""
        path = await self.unit_path(unit)
        kind = unit.rpartition('.')[2].capitalize()
        return str(await self._client.property_(SERVICE, path, f'org.freedesktop.systemd1.{kind}', 'ControlGroup'))

    async def _manager(self, method: str, unit: str, timeout: float = 25) -> object:  # noqa: ASYNC109 - of the call
        try:
            return await self._client.call(SERVICE, PATH, MANAGER, method, 's', unit, timeout=timeout)
        except CkptError as error:
            error.resource = error.resource or f'unit {unit}'
            raise
