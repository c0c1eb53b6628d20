# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs by number. A finished job is kept for a while, so that a late question is answered."""

import asyncio
from collections.abc import Callable, Iterator

from ckptd.errors import NoSuchJob
from ckptd.jobs.state import JobRecord

MOST_OVER = 128     # finished jobs of one user; of more, the oldest are forgotten


class KnownJobs:
    """Known jobs. seconds: how long a finished job is kept. forgotten: called with a job when it is dropped."""

    def __init__(self, seconds: float, forgotten: Callable[[JobRecord], None]) -> None:
        self._seconds, self._forgotten = seconds, forgotten
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[int, JobRecord] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}       # of finished jobs, the oldest first

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[JobRecord]:
        return iter(list(self._jobs.values()))

    def __getitem__(self, number: int) -> JobRecord:
        """Return the job of this number. NoSuchJob."""
        try:
            return self._jobs[number]
        except KeyError:
            raise NoSuchJob(f'no job {number}') from None

    def add(self, job: JobRecord) -> None:
        self._jobs[job.number] = job

    def drop(self, job: JobRecord) -> None:
        """Drop the job at once, without a callback."""
        del self._jobs[job.number]

    def over(self, job: JobRecord) -> None:
        """Note that the job is over. It will be forgotten after a while."""
        uid = job.request.asked_by
        self._timers[job.number] = self._loop.call_later(self._seconds, self._forget, job)
        own = [number for number in self._timers if self._jobs[number].request.asked_by == uid]
        for number in own[:-MOST_OVER]:
            self._forget(self._jobs[number])

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()

    def _forget(self, job: JobRecord) -> None:
        self._timers.pop(job.number).cancel()
        del self._jobs[job.number]
        self._forgotten(job)
