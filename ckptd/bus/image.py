# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.ckptd1.Image at /org/ckptd1/image/ID: a published image."""

from typing import Any

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
from ckptd.protocol.messages import FORMATS

# of the rows of Scan and Tree: what is not said here is 's', or 't' for a number
TASK_TYPES = {'tid': 'u', 'tgid': 'u', 'ppid': 'u', 'pgid': 'u', 'sid': 'u', 'vtid': 'u', 'parent_tid': 'u',
              'depth': 'u', 'uid': 'u', 'fds': 'as', 'fds_left_out': 'u'}

ROW_TYPES = {'pid': 'u'}        # of refusals


class ImageObject(Exported):
    interface = IMAGE

    def __init__(self, info: SpooledImage, image_service: ImageService, authorizer: Authorizer) -> None:
        self.info, self._image_service, self._authorizer = info, image_service, authorizer
        self.audience = Audience(info.owner)

    @method('', 'aa{sv}', names=('tasks',), types=TASK_TYPES)
    async def Tree(self, call: Call) -> list[dict[str, Any]]:
        """The tasks of the image in depth-first order, as Manager.Scan has those of a live tree."""
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        async with call.attended():
            return await self._image_service.tree(self.info.id, rights)

    @method('hsa{sv}', names=('output', 'format', 'options'))
    async def Export(self, call: Call, output: int, format: str, options: dict[str, Any]) -> None:
        """Write the image to `output` as a tar stream of files in that format; returns when all is written."""
        parse_options(options, NONE)
        if format not in FORMATS:
            raise InvalidArgument(f'no format {format[:32]!r}', hint=f'formats: {", ".join(FORMATS)}')
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        async with call.attended():
            await self._image_service.export(self.info.id, output, format, rights)

    @method('', 'h', names=('stream',))
    async def Open(self, call: Call) -> UnixFd:
        """A file descriptor to read the image from, as the tar stream that Manager.Import takes. It ends early where
        something goes wrong: the job of its export says what."""
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        return UnixFd(self._image_service.open(self.info.id, rights))

    @method('', 'as', names=('damages',))
    async def Verify(self, call: Call) -> list[str]:
        """What is wrong with the image, one sentence each; nothing for one that is whole."""
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        async with call.attended():
            return await self._image_service.verify(self.info.id, rights)

    @method('a{sv}', 'o', names=('options', 'job'))
    async def Restore(self, call: Call, options: dict[str, Any]) -> str:
        """As Manager.Restore."""
        return await restore(self._image_service, self._authorizer, call, self.info.id, options)

    @method('a{sv}', 'aa{sv}', names=('options', 'refusals'), types=ROW_TYPES)
    async def CheckRestore(self, call: Call, options: dict[str, Any]) -> list[dict[str, Any]]:
        """As Manager.CheckRestore."""
        return await check_restore(self._image_service, self._authorizer, call, self.info.id, options)

    @method()
    async def Remove(self, call: Call) -> None:
        """Remove the image; Busy while a job reads it."""
        rights = await self._authorizer.image(call, 'manage', self.info.id)
        await self._image_service.remove(self.info.id, rights)

    @property_('s', emits='const')
    def Id(self) -> str:
        """The name of the image."""
        return self.info.id

    @property_('s', emits='const')
    def Target(self) -> str:
        """What was dumped."""
        return self.info.target

    @property_('s', emits='const')
    def Command(self) -> str:
        """The name of the root's program."""
        return self.info.command

    @property_('t', emits='const')
    def Created(self) -> int:
        """When it was made, in microseconds of the real-time clock."""
        return self.info.created

    @property_('u', emits='const')
    def Owner(self) -> int:
        """The uid that it belongs to."""
        return self.info.owner

    @property_('u', emits='const')
    def Tasks(self) -> int:
        """How many tasks it has."""
        return self.info.tasks

    @property_('u', emits='const')
    def Processes(self) -> int:
        """How many processes it has."""
        return self.info.processes

    @property_('t', emits='const')
    def Size(self) -> int:
        """How many bytes it has."""
        return self.info.size

    @property_('s', emits='const')
    def Kernel(self) -> str:
        """The release of the kernel that it was made on."""
        return self.info.kernel

    @property_('s', emits='const')
    def Architecture(self) -> str:
        """The machine's, as of uname(2)."""
        return self.info.architecture

    @property_('s', emits='const')
    def BootId(self) -> str:
        """Of the boot that it was made on."""
        return self.info.boot_id

    @property_('a{st}', emits='const')
    def Statistics(self) -> dict[str, int]:
        """Times in microseconds, and pages, of its checkpoint."""
        return self.info.statistics
