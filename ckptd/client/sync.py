# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client for programs without an event loop, with the same names, options, records and errors.

    from ckptd.client.sync import connect

    with connect() as ckptd:
        result = ckptd.checkpoint('pid:42', after='kill').wait(timeout=60)
        ckptd.restore(result.image).wait()

An event loop runs in a thread for as long as the connection lasts. Any thread of the program may call.
"""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Generic, Self, TypeVar, Unpack

from ckptd.client import connection
from ckptd.client.connection import AnyResult, Inhibitor
from ckptd.client.events import Event, Progress, Running
from ckptd.client.hub import Events as AsyncEvents
from ckptd.client.job import Job as AsyncJob
from ckptd.client.job import R
from ckptd.client.records import (
    CheckOptions,
    CheckpointOptions,
    CheckpointResult,
    CheckRestoreOptions,
    FreezeOptions,
    ImageDetails,
    ImageInfo,
    InhibitorInfo,
    JobInfo,
    JobStatus,
    ManagerInfo,
    RestoreOptions,
    RestoreResult,
    TaskInfo,
)
from ckptd.errors import Finding

__all__ = ['Inhibitor', 'SyncCkptd', 'SyncEvents', 'SyncImage', 'SyncJob', 'connect']

T = TypeVar('T')


class LoopThread:
    """An event loop in a thread of its own while the context lasts. At its end, running tasks are cancelled."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._begun = threading.Event()
        # daemon: a program that ends without leaving the context must not be delayed
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name='ckptd-client', daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _live(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._begun.set()
        await self._stop.wait()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine and return its result. timeout: seconds, after which it is cancelled with TimeoutError.
        Ctrl-C cancels it as well."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise


@contextlib.contextmanager
def connect(bus: str = 'system', *, interactive: bool = False) -> Iterator['SyncCkptd']:
    """Connect as ckptd.client.connect does."""
    with LoopThread() as thread:
        context = connection.connect(bus, interactive=interactive)
        ckptd = thread.run(_enter(context))
        try:
            yield SyncCkptd(thread, ckptd)
        finally:
            thread.run(_leave(context))


class SyncCkptd:
    """A connection to the daemon, made by `connect`. ckptd.client.Ckptd describes the methods."""

    def __init__(self, thread: LoopThread, ckptd: connection.Ckptd) -> None:
        self._thread, self._ckptd = thread, ckptd

    def checkpoint(self, target: str, **options: Unpack[CheckpointOptions]) -> 'SyncJob[CheckpointResult]':
        return SyncJob(self._thread, self._thread.run(self._ckptd.checkpoint(target, **options)))

    def checkpoint_process(self, pidfd: int, **options: Unpack[CheckpointOptions]) -> 'SyncJob[CheckpointResult]':
        return SyncJob(self._thread, self._thread.run(self._ckptd.checkpoint_process(pidfd, **options)))

    def check(self, target: str, **options: Unpack[CheckOptions]) -> list[Finding]:
        return self._thread.run(self._ckptd.check(target, **options))

    def scan(self, target: str) -> list[TaskInfo]:
        return self._thread.run(self._ckptd.scan(target))

    def freeze(self, target: str, **options: Unpack[FreezeOptions]) -> int:
        return self._thread.run(self._ckptd.freeze(target, **options))

    def thaw(self, target: str) -> None:
        self._thread.run(self._ckptd.thaw(target))

    def inhibit(self, who: str, why: str, target: str = 'self') -> Inhibitor:
        return self._thread.run(self._ckptd.inhibit(who, why, target))

    def list_inhibitors(self) -> list[InhibitorInfo]:
        return self._thread.run(self._ckptd.list_inhibitors())

    def restore(self, image: str, **options: Unpack[RestoreOptions]) -> 'SyncJob[RestoreResult]':
        return SyncJob(self._thread, self._thread.run(self._ckptd.restore(image, **options)))

    def check_restore(self, image: str, **options: Unpack[CheckRestoreOptions]) -> list[Finding]:
        return self._thread.run(self._ckptd.check_restore(image, **options))

    def list_images(self) -> list[ImageInfo]:
        return self._thread.run(self._ckptd.list_images())

    def image(self, id: str) -> 'SyncImage':
        return SyncImage(self._thread, self._thread.run(self._ckptd.image(id)))

    def import_image(self, stream: int) -> 'SyncImage':
        return SyncImage(self._thread, self._thread.run(self._ckptd.import_image(stream)))

    def list_jobs(self) -> list[JobInfo]:
        return self._thread.run(self._ckptd.list_jobs())

    def job(self, id: int) -> 'SyncJob[AnyResult]':
        return SyncJob(self._thread, self._thread.run(self._ckptd.job(id)))

    def info(self) -> ManagerInfo:
        return self._thread.run(self._ckptd.info())

    @contextlib.contextmanager
    def events(self, *kinds: type[Event]) -> Iterator['SyncEvents']:
        context = self._ckptd.events(*kinds)
        events = SyncEvents(self._thread, self._thread.run(_enter(context)))
        try:
            yield events
        finally:
            self._thread.run(_leave(context))


class SyncJob(Generic[R]):
    """A job like ckptd.client.Job: `for event in job: ...`, then `job.wait()`."""

    def __init__(self, thread: LoopThread, job: AsyncJob[R]) -> None:
        self._thread, self._job = thread, job

    @property
    def path(self) -> str:
        return self._job.path

    @property
    def id(self) -> int:
        return self._job.id

    @property
    def root(self) -> int:
        return self._job.root

    def wait(self, timeout: float | None = None) -> R:
        """Wait for the result. TimeoutError after so many seconds; the job goes on."""
        return self._thread.run(self._job.wait(), timeout)

    def cancel(self) -> None:
        self._thread.run(self._job.cancel())

    def status(self) -> JobStatus:
        return self._thread.run(self._job.status())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Progress | Running:
        try:
            return self._thread.run(self._job.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None


class SyncImage:
    """An image like ckptd.client.Image."""

    def __init__(self, thread: LoopThread, image: connection.Image) -> None:
        self._thread, self._image = thread, image

    @property
    def id(self) -> str:
        return self._image.id

    @property
    def path(self) -> str:
        return self._image.path

    def info(self) -> ImageDetails:
        return self._thread.run(self._image.info())

    def tree(self) -> list[TaskInfo]:
        return self._thread.run(self._image.tree())

    def verify(self) -> list[str]:
        return self._thread.run(self._image.verify())

    def remove(self) -> None:
        self._thread.run(self._image.remove())

    def export(self, output: int, format: str = 'core') -> None:
        self._thread.run(self._image.export(output, format))

    def open(self) -> int:
        return self._thread.run(self._image.open())

    def restore(self, **options: Unpack[RestoreOptions]) -> SyncJob[RestoreResult]:
        return SyncJob(self._thread, self._thread.run(self._image.restore(**options)))

    def check_restore(self, **options: Unpack[CheckRestoreOptions]) -> list[Finding]:
        return self._thread.run(self._image.check_restore(**options))


class SyncEvents:
    """Events like ckptd.client.Events: `for event in events`."""

    def __init__(self, thread: LoopThread, events: AsyncEvents) -> None:
        self._thread, self._events = thread, events

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        return self.next()

    def next(self, timeout: float | None = None) -> Event:
        """Return the next event. TimeoutError after so many seconds."""
        return self._thread.run(self._events.__anext__(), timeout)


async def _enter(context: contextlib.AbstractAsyncContextManager[T]) -> T:
    return await context.__aenter__()


async def _leave(context: contextlib.AbstractAsyncContextManager[Any]) -> None:
    await context.__aexit__(None, None, None)
