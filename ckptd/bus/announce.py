# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the queue and the spool tell, said on the bus: objects come and go, signals are sent."""

import asyncio

from ckptd.bus.image import ImageObject
from ckptd.bus.job import JobObject, path_of
from ckptd.bus.manager import ManagerObject
from ckptd.bus.names import ROOT, image_path
from ckptd.bus.router import Router
from ckptd.jobs.library import Library
from ckptd.jobs.queue import Queue
from ckptd.jobs.spool import ImageInfo, Spool
from ckptd.jobs.state import Job


class Announcer:
    """The queue's listener. Silent until `begin`, for the queue is there before the bus is."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._looking = asyncio.Lock()
        self._jobs: dict[int, JobObject] = {}

    def begin(self, router: Router, manager: ManagerObject, queue: Queue, library: Library) -> None:
        """Export the manager and every image that is known."""
        self._router, self._manager, self._queue, self._library = router, manager, queue, library
        router.export(ROOT, manager)
        for info in self._spool.images:
            router.export(image_path(info.id), ImageObject(info, library))

    def job_new(self, job: Job) -> None:
        made = self._jobs[job.number] = JobObject(job, self._queue)
        self._router.export(path_of(job), made)
        self._manager.JobNew(job.number, path_of(job))
        self._manager.changed('Jobs')

    def job_changed(self, job: Job) -> None:
        if job.number in self._jobs:
            self._jobs[job.number].tell_state()

    def job_progress(self, job: Job) -> None:
        self._jobs[job.number].tell_progress()

    def job_removed(self, job: Job) -> None:
        self._manager.JobRemoved(job.number, path_of(job), job.state.value)
        self._manager.changed('Jobs')

    def job_forgotten(self, job: Job) -> None:
        del self._jobs[job.number]
        self._router.unexport(path_of(job))

    def frozen_changed(self) -> None:
        self._manager.changed('FrozenTargets')

    async def images_changed(self) -> None:
        """Look into the spool and tell what is new and what is gone."""
        async with self._looking:
            added, gone = self._spool.adopt(await asyncio.to_thread(self._spool.look))
        for info in added:
            self._add(info)
        for image in gone:
            self._router.unexport(image_path(image))
            self._manager.ImageRemoved(image, image_path(image))
        if added or gone:
            self._manager.changed('Images')

    def _add(self, info: ImageInfo) -> None:
        self._router.export(image_path(info.id), ImageObject(info, self._library))
        self._manager.ImageAdded(info.id, image_path(info.id))
