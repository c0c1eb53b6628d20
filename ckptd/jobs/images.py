# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on published images. They are for the owner and root."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from ckptd.errors import Busy, NoSuchImage
from ckptd.jobs.queue import Queue
from ckptd.jobs.requests import R, RequestFactory
from ckptd.jobs.slots import Slots
from ckptd.jobs.spool import Spool, SpooledImage
from ckptd.jobs.state import JobRecord
from ckptd.protocol.requests import (
    Caller,
    CheckRestoreRequest,
    ExportRequest,
    Format,
    ImageTreeRequest,
    RemoveNamesRequest,
    RestoreRequest,
    VerifyRequest,
    operation_of,
)

REMOVALS = 2        # at a time, one for each user: the time depends on the disk, and all users share the threads


class ImageRights(NamedTuple):
    """Rights for an operation on an image."""
    caller: Caller    # the work is done with these rights: root's if an administrator allowed it
    who: Caller       # the user who asked, who sees the job and to whom limits apply


class ImageService:
    """Operations on images. Workers read the images, because an image is untrusted input and large."""

    def __init__(self, spool: Spool, queue: Queue, request_factory: RequestFactory) -> None:
        self.spool, self.queue = spool, queue
        self._request_factory = request_factory
        self._going: set[str] = set()       # ids of images that are being removed
        self._removals = Slots(REMOVALS, 1)

    async def verify(self, image: str, rights: ImageRights) -> list[str]:
        """List the damages of the image, one sentence each."""
        result = await self.queue.call(self._order(VerifyRequest, image, rights))
        return [str(damage) for damage in result.get('damages', ())]

    async def tree(self, image: str, rights: ImageRights) -> list[dict[str, Any]]:
        """List the tasks of the image, in rows like those of Manager.Scan."""
        result = await self.queue.call(self._order(ImageTreeRequest, image, rights))
        return list(result.get('tasks', ()))

    async def export(self, image: str, output: int, format_: Format, rights: ImageRights) -> None:
        """Write the image to the fd `output` as a tar stream."""
        request = self._order(ExportRequest, image, rights, format=format_, writer=rights.who)
        await self.queue.call(request, [output])

    def open(self, image: str, rights: ImageRights) -> int:
        """Return the reading end of a pipe from which the image comes as a tar stream. The caller closes it, and the
        job ends with it."""
        request = self._order(ExportRequest, image, rights, format='tar', writer=rights.who)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            self.queue.submit(request, [theirs])
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return ours

    async def take_in(self, stream: int, caller: Caller) -> str:
        """Import an image from a tar stream and return its id. The stream is untrusted. The image belongs to the
        caller."""
        result = await self.queue.call(self._request_factory.on_stream(caller), [stream])
        return str(result['image'])

    def restore(self, image: str, rights: ImageRights, fds: Sequence[int], token: str, **wishes: Any) -> JobRecord:
        """Start a job that restores the tree of the image. wishes: fields of RestoreRequest."""
        return self.queue.submit(self._order(RestoreRequest, image, rights, **wishes), fds, token)

    async def check_restore(self, image: str, rights: ImageRights, fds: Sequence[int], **wishes: Any
                            ) -> list[dict[str, Any]]:
        """List every refusal and warning of such a restore, as rows."""
        result = await self.queue.call(self._order(CheckRestoreRequest, image, rights, **wishes), fds)
        return list(result.get('refusals', ()))

    async def remove(self, image: str, rights: ImageRights) -> None:
        info = self._open(image, rights.caller, 'remove')
        if self.queue.works_on(image):
            raise Busy(f'a job reads image {image}', resource=image)
        if info.names:
            await self.queue.call(self._order(RemoveNamesRequest, image, rights))
        self._going.add(image)      # from here on no job may begin to read it
        try:
            async with self._removals.slot(rights.who.uid):
                await asyncio.to_thread(self.spool.remove, info)
        finally:
            self._going.discard(image)

    def _order(self, kind: type[R], image: str, rights: ImageRights, **more: Any) -> R:
        info = self._open(image, rights.caller, operation_of(kind))
        return self._request_factory.on_image(kind, info, rights.caller, asker=rights.who.uid, **more)

    def _open(self, image: str, caller: Caller, verb: str) -> SpooledImage:
        info = self.spool.find(image)
        if image in self._going:
            raise NoSuchImage(f'image {image} is being removed', resource=image)
        info.check_owner(caller.uid, verb)
        return info
