# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cancel a job when its caller disconnects, unless `detach` was given."""

from contextlib import suppress

from ckptd.bus.call import Call
from ckptd.errors import NoSuchJob
from ckptd.jobs.queue import Queue
from ckptd.jobs.state import JobRecord


async def attach(call: Call, queue: Queue, job: JobRecord) -> None:
    """Cancel the job when its caller leaves the bus."""
    def leave() -> None:
        with suppress(NoSuchJob):
            queue.cancel(job.number)

    try:
        await call.when_gone(leave)
    except BaseException:
        leave()         # the caller would never hear of the job
        raise
    queue.when_over(job, lambda: call.never_mind(leave))
