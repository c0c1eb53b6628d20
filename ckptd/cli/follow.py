# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start a job and follow it to its end.

The signals are subscribed to before the call, so the first of them cannot be missed however short the job is.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptd.bus.names import JOB, MANAGER
from ckptd.cli.progress import Follower
from ckptd.cli.session import Daemon, Signals
from ckptd.errors import NoSuchJob, Unavailable, from_details

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


async def run_job(daemon: Daemon, order: Order, bar: Follower,
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
                    await _cancel(daemon, path)
                    await _follow(signals, path, bar, running)
            return await outcome(daemon, path)


@contextlib.contextmanager
def _lost_hint(order: Order) -> Iterator[None]:
    """A daemon that goes away in the middle is another matter than one that was never there."""
    try:
        yield
    except Unavailable as error:
        raise Unavailable(f'{error.message}, while it worked on {order.about}',
                          hint=f'{order.lost}; see the daemon\'s log (journalctl -u ckptd)') from error


async def outcome(daemon: Daemon, path: str) -> dict[str, Any]:
    """Result of a job that has ended; raises what it failed with."""
    job = await daemon.job_properties(path)
    if job['State'] == 'done':
        return dict(job['Result'])
    error = dict(job['Error'])
    raise from_details(error.pop('name', ''), error.pop('message', f'the job ended as {job["State"]}'), error)


async def _follow(signals: Signals, path: str, bar: Follower, running: Callable[[int], None]) -> None:
    """Until JobRemoved says that the job at `path` has ended."""
    async for signal in signals:
        if signal.path == path and signal.member == 'PropertiesChanged' and signal.args[1].get('Root'):
            running(signal.args[1]['Root'])
        if signal.path == path and signal.member == 'Progress' and signal.interface == JOB:
            phase, progress, bytes_done, bytes_total = signal.args
            bar.update(phase, progress, bytes_done, bytes_total)
        elif signal.interface == MANAGER and signal.member == 'JobRemoved' and signal.args[1] == path:
            return


async def _cancel(daemon: Daemon, path: str) -> None:
    """Cancel; a job that ended in the meantime has nothing left to cancel."""
    try:
        await daemon.call(path, JOB, 'Cancel', 'a{sv}', {})
    except NoSuchJob:
        return


def _forget_interrupt() -> None:
    """Take back the cancellation of this task: it has been turned into the cancellation of the job."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
