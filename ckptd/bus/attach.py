# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job is its caller's: who leaves the bus before it is over, and did not say `detach`, wanted it for himself."""

from contextlib import suppress

from ckptd.bus.call import Call
from ckptd.errors import NoSuchJob
from ckptd.jobs.queue import Queue
from ckptd.jobs.state import JobRecord


async def attach(call: Call, queue: Queue, job: JobRecord) -> None:
    """Cancel the job when its caller leaves."""
    def leave() -> None:
        with suppress(NoSuchJob):
            queue.cancel(job.number)

    try:
        await call.when_gone(leave)
    except BaseException:
        leave()         # nobody would ever hear of it
        raise
    queue.when_over(job, lambda: call.never_mind(leave))
