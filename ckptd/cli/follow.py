# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start a job and follow it to its end.

The signals are subscribed to before the call, so the first of them cannot be missed however short the job is.
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
class Order:
    """A job to be asked for: a method of the manager, the target or image that it is about, its options.

    lost: what becomes of the tree when the daemon goes away in the middle of it.
    """
    method: str
    about: str
    options: dict[str, Any]
    lost: str = 'the tree is released by itself'


async def run_job(daemon: DaemonProxy, order: Order, bar: Follower,
                  running: Callable[[int], None] = lambda root: None) -> dict[str, Any]:
    """The Result of the job. Raises the job's error; Ctrl-C cancels it and raises Cancelled.

    running: called with the pid of the root once a restored tree runs.
    """
    async with daemon.signals() as signals:
        with _lost_hint(order):
            call = asyncio.ensure_future(daemon.manager(order.method, 'sa{sv}', order.about, order.options))
            try:
                # shield: interrupted here, the job exists and its path has to be known before it can be cancelled
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
def _lost_hint(order: Order) -> Iterator[None]:
    """A daemon that goes away in the middle is another matter than one that was never there."""
    try:
        yield
    except Unavailable as error:
        raise Unavailable(f'{error.message}, while it worked on {order.about}',
                          hint=f'{order.lost}; see the daemon\'s log (journalctl -u ckptd)') from error


async def _follow(signals: Signals, path: str, bar: Follower, running: Callable[[int], None]) -> None:
    """Until JobRemoved says that the job at `path` has ended."""
    async for signal in signals:
        match event_of(signal):
            case Running(job, root) if job == path:
                running(root)
            case Progress(job, phase, progress, bytes_done, bytes_total) if job == path:
                bar.update(phase, progress, bytes_done, bytes_total)
            case JobRemoved(_, job) if job == path:
                return


def _forget_interrupt() -> None:
    """Take back the cancellation of this task: it has been turned into the cancellation of the job."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
