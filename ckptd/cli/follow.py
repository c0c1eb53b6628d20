# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start a job and follow it to its end.

The signals are subscribed to before the call, so the first of them is not missed however short the job is.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptd.cli.progress import Follower
from ckptd.cli.session import DaemonProxy, Signals
from ckptd.client.daemon import outcome
from ckptd.client.events import JobRemoved, Progress, Running, event_of
from ckptd.errors import Unavailable

CANCEL_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class JobCall:
    """A request for a job."""
    method: str                                     # a method of the manager
    about: str                                      # the target or image
    options: dict[str, Any]
    lost: str = 'the tree is released by itself'    # what happens to the tree if the daemon dies meanwhile


async def run_job(daemon: DaemonProxy, job_call: JobCall, bar: Follower,
                  running: Callable[[int], None] = lambda root: None) -> dict[str, Any]:
    """Return the Result of the job, or raise its error. Ctrl-C cancels the job and raises Cancelled.

    running: called with the pid of the root once a restored tree runs.
    """
    async with daemon.signals() as signals:
        with _lost_hint(job_call):
            call = asyncio.ensure_future(daemon.manager(job_call.method, 'sa{sv}', job_call.about, job_call.options))
            try:
                # shield: if it is interrupted here, the job exists, and it can only be cancelled by its path
                path = await asyncio.shield(call)
                await _follow(signals, path, bar, running)
            except asyncio.CancelledError:
                _forget_interrupt()
                bar.message('cancelling')
                path = await call
                async with asyncio.timeout(CANCEL_TIMEOUT):
                    await daemon.cancel(path)
                    await _follow(signals, path, bar, running)
            return outcome(await daemon.job_properties(path))


@contextlib.contextmanager
def _lost_hint(job_call: JobCall) -> Iterator[None]:
    """Add a hint to the error if the daemon went away during the job."""
    try:
        yield
    except Unavailable as error:
        raise Unavailable(f'{error.message}, while it worked on {job_call.about}',
                          hint=f'{job_call.lost}; see the daemon\'s log (journalctl -u ckptd)') from error


async def _follow(signals: Signals, path: str, bar: Follower, running: Callable[[int], None]) -> None:
    """Update the bar until JobRemoved reports the end of the job at `path`."""
    async for signal in signals:
        match event_of(signal):
            case Running(job, root) if job == path:
                running(root)
            case Progress(job, phase, progress, bytes_done, bytes_total) if job == path:
                bar.update(phase, progress, bytes_done, bytes_total)
            case JobRemoved(_, job) if job == path:
                return


def _forget_interrupt() -> None:
    """Take back the cancellation of this task, which became the cancellation of the job."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
