# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.ckptd1.Image at /org/ckptd1/image/ID: a published image."""

from typing import Any, cast

from ckptd.bus.authorizer import Authorizer
from ckptd.bus.call import Call
from ckptd.bus.export import Audience, Exported, method, property_
from ckptd.bus.message import UnixFd
from ckptd.bus.names import IMAGE
from ckptd.bus.options import NONE, parse_options
from ckptd.bus.restore import check_restore, restore
from ckptd.errors import InvalidArgument
from ckptd.jobs.images import ImageService
from ckptd.jobs.spool import SpooledImage
from ckptd.protocol.requests import FORMATS, Format

# types in the rows of Scan and Tree; all others are 's', or 't' for a number
TASK_TYPES = {'tid': 'u', 'tgid': 'u', 'ppid': 'u', 'pgid': 'u', 'sid': 'u', 'vtid': 'u', 'parent_tid': 'u',
              'depth': 'u', 'uid': 'u', 'fds': 'as', 'fds_left_out': 'u'}

ROW_TYPES = {'pid': 'u'}        # types in rows of refusals


class ImageObject(Exported):
    interface = IMAGE

    def __init__(self, info: SpooledImage, image_service: ImageService, authorizer: Authorizer) -> None:
        self.info, self._image_service, self._authorizer = info, image_service, authorizer
        self.audience = Audience(info.owner)

    @method('', 'aa{sv}', names=('tasks',), types=TASK_TYPES)
    async def Tree(self, call: Call) -> list[dict[str, Any]]:
        """List the tasks of the image in depth-first order, as Manager.Scan does for a live tree."""
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        async with call.attended():
            return await self._image_service.tree(self.info.id, rights)

    @method('hsa{sv}', names=('output', 'format', 'options'))
    async def Export(self, call: Call, output: int, format: str, options: dict[str, Any]) -> None:
        """Write the image to `output` as a tar stream of files in that format. Returns when all is written."""
        parse_options(options, NONE)
        if format not in FORMATS:
            raise InvalidArgument(f'unknown format {format[:32]!r}', hint=f'formats: {", ".join(FORMATS)}')
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        async with call.attended():
            await self._image_service.export(self.info.id, output, cast(Format, format), rights)

    @method('', 'h', names=('stream',))
    async def Open(self, call: Call) -> UnixFd:
        """Return a file descriptor to read the image from: the tar stream that Manager.Import takes. The stream ends
        early if something goes wrong; the job of the export then has the error."""
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        return UnixFd(self._image_service.open(self.info.id, rights))

    @method('', 'as', names=('damages',))
    async def Verify(self, call: Call) -> list[str]:
        """List the damages of the image, one sentence each. The list of an intact image is empty."""
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        async with call.attended():
            return await self._image_service.verify(self.info.id, rights)

    @method('a{sv}', 'o', names=('options', 'job'))
    async def Restore(self, call: Call, options: dict[str, Any]) -> str:
        """Start a job that restores the tree, as Manager.Restore does."""
        return await restore(self._image_service, self._authorizer, call, self.info.id, options)

    @method('a{sv}', 'aa{sv}', names=('options', 'refusals'), types=ROW_TYPES)
    async def CheckRestore(self, call: Call, options: dict[str, Any]) -> list[dict[str, Any]]:
        """List the refusals and warnings of a restore, as Manager.CheckRestore does."""
        return await check_restore(self._image_service, self._authorizer, call, self.info.id, options)

    @method()
    async def Remove(self, call: Call) -> None:
        """Remove the image. Busy while a job reads it."""
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        await self._image_service.remove(self.info.id, rights)

    @property_('s', emits='const')
    def Id(self) -> str:
        """Name of the image."""
        return self.info.id

    @property_('s', emits='const')
    def Target(self) -> str:
        """Target that was dumped."""
        return self.info.target

    @property_('s', emits='const')
    def Command(self) -> str:
        """Name of the root's program."""
        return self.info.command

    @property_('t', emits='const')
    def Created(self) -> int:
        """Time of the checkpoint, in microseconds of the real-time clock."""
        return self.info.created

    @property_('u', emits='const')
    def Owner(self) -> int:
        """Uid of the owner."""
        return self.info.owner

    @property_('u', emits='const')
    def Tasks(self) -> int:
        """Number of tasks."""
        return self.info.tasks

    @property_('u', emits='const')
    def Processes(self) -> int:
        """Number of processes."""
        return self.info.processes

    @property_('t', emits='const')
    def Size(self) -> int:
        """Size in bytes."""
        return self.info.size

    @property_('s', emits='const')
    def Kernel(self) -> str:
        """Release of the kernel on which the image was made."""
        return self.info.kernel

    @property_('s', emits='const')
    def Architecture(self) -> str:
        """Architecture of the machine, as uname(2) reports it."""
        return self.info.architecture

    @property_('s', emits='const')
    def BootId(self) -> str:
        """Id of the boot during which the image was made."""
        return self.info.boot_id

    @property_('a{st}', emits='const')
    def Statistics(self) -> dict[str, int]:
        """Statistics of the checkpoint: times in microseconds, and numbers of pages."""
        return self.info.statistics
