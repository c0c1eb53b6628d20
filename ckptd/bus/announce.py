# SPDX-License-Identifier: LGPL-2.1-or-later
"""Announce events of the queue and the spool on the bus: objects come and go, signals are sent."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from ckptd.bus.authorizer import Authorizer
from ckptd.bus.export import Audience
from ckptd.bus.image import ImageObject
from ckptd.bus.job import JobObject, path_of
from ckptd.bus.manager import ManagerObject
from ckptd.bus.names import ROOT, image_path
from ckptd.bus.router import Router
from ckptd.errors import NoSuchImage
from ckptd.jobs.images import ImageService
from ckptd.jobs.inhibitors import InhibitorLock
from ckptd.jobs.queue import Queue
from ckptd.jobs.spool import Spool, SpooledImage
from ckptd.jobs.state import JobRecord


class Announcer:
    """A listener of the queue. It stays silent until `begin`, because the queue exists before the bus connection."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._lookup = asyncio.Lock()
        # number of looks that were requested, and the value of it when the last look began
        self._asked = self._seen = 0
        self._jobs: dict[int, JobObject] = {}

    def begin(self, router: Router, manager: ManagerObject, queue: Queue, image_service: ImageService,
              authorizer: Authorizer) -> None:
        """Export the manager and every image that is known."""
        self._router, self._manager, self._queue, self._image_service = router, manager, queue, image_service
        self._authorizer = authorizer
        router.export(ROOT, manager)
        for info in self._spool.images:
            router.export(image_path(info.id), ImageObject(info, image_service, authorizer))

    def job_new(self, job: JobRecord) -> None:
        made = self._jobs[job.number] = JobObject(job, self._queue, self._authorizer)
        self._router.export(path_of(job), made)
        self._manager.JobNew.to(Audience(job.request.asked_by), job.number, path_of(job))
        self._manager.changed('Jobs', to=Audience(job.request.asked_by))

    def job_changed(self, job: JobRecord) -> None:
        if job.number in self._jobs:
            self._jobs[job.number].tell_state()

    def job_progress(self, job: JobRecord) -> None:
        self._jobs[job.number].tell_progress()

    def job_removed(self, job: JobRecord) -> None:
        self._manager.JobRemoved.to(Audience(job.request.asked_by), job.number, path_of(job), job.state.value)
        self._manager.changed('Jobs', to=Audience(job.request.asked_by))

    def job_forgotten(self, job: JobRecord) -> None:
        del self._jobs[job.number]
        self._router.unexport(path_of(job))

    def job_prepares(self, job: JobRecord, start: bool, inhibitors: Sequence[InhibitorLock]) -> None:
        """Send PrepareForCheckpoint to the user of the job and to all holders of the inhibitors."""
        holders = Audience(job.request.asked_by, frozenset(one.sender for one in inhibitors))
        self._manager.PrepareForCheckpoint.to(holders, path_of(job), start)

    def tree_restored(self, job: JobRecord, tasks: int) -> None:
        with suppress(NoSuchImage):     # the image was removed while its tree was made; the tree runs all the same
            image = self._spool.find(job.request.image_id)
            self._manager.Restored.to(Audience(image.owner), image.id, tasks)

    def frozen_changed(self, uid: int) -> None:
        self._manager.changed('FrozenTargets', to=Audience(uid))

    async def images_changed(self) -> None:
        """Look into the spool and announce new and removed images. One look serves all callers who ask before it
        begins."""
        self._asked += 1
        asked = self._asked
        async with self._lookup:
            if self._seen < asked:
                seen = self._asked
                await self._tell(*self._spool.adopt(await asyncio.to_thread(self._spool.look)))
                self._seen = seen

    async def _tell(self, added: Sequence[SpooledImage], gone: Sequence[SpooledImage]) -> None:
        for info in added:
            self._add(info)
            await self._router.pause()
        for info in gone:
            self._router.unexport(image_path(info.id))
            self._manager.ImageRemoved.to(Audience(info.owner), info.id, image_path(info.id))
            await self._router.pause()
        for uid in {info.owner for info in (*added, *gone)}:
            self._manager.changed('Images', to=Audience(uid))

    def _add(self, info: SpooledImage) -> None:
        self._router.export(image_path(info.id), ImageObject(info, self._image_service, self._authorizer))
        self._manager.ImageAdded.to(Audience(info.owner), info.id, image_path(info.id))
