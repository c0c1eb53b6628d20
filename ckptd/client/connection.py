# SPDX-License-Identifier: LGPL-2.1-or-later
"""A typed client for programs with an event loop."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Final, Self, Unpack

from ckptd.bus import client as bus_client
from ckptd.bus.message import ALLOW_INTERACTIVE, UnixFd
from ckptd.bus.names import IMAGE, MANAGER, ROOT, token_path
from ckptd.client.daemon import LONG, QUICK, DaemonProxy, new_token
from ckptd.client.events import Event
from ckptd.client.hub import Events, Listening
from ckptd.client.job import Job, Make, R
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
    ManagerInfo,
    RestoreOptions,
    RestoreResult,
    TaskInfo,
    from_properties,
    from_row,
)
from ckptd.errors import CkptError, Finding, NoSuchJob, Unavailable, finding_from

AnyResult = CheckpointResult | RestoreResult | dict[str, Any]


@contextlib.asynccontextmanager
async def connect(bus: str = 'system', *, interactive: bool = False) -> AsyncIterator['Ckptd']:
    """Connect to ckptd on the 'system' or 'session' bus, or on the bus at an address. The bus starts ckptd if it can.

        async with connect() as ckptd:
            job = await ckptd.checkpoint('pid:42', after='kill')
            result = await job.wait()
            await (await ckptd.restore(result.image)).wait()

    interactive: polkit may ask a person, however long that takes. Unavailable if there is no bus. If there is no
    daemon, the first call raises the error.
    """
    async with await bus_client.connect(bus) as client:
        ckptd = Ckptd(DaemonProxy(client, ALLOW_INTERACTIVE if interactive else 0))
        try:
            yield ckptd
        finally:
            await ckptd.close()


class Ckptd:
    """A connection to the daemon, made by `connect`. Every method raises the CkptError that the daemon answers, or
    Unavailable if there is no daemon.

    A target is 'pid:N', a unit's name, 'cgroup:/path' or 'self'. Options have the names and units of the bus. If a call
    that starts a job is cancelled, the job is cancelled as well. The daemon works on a question until it is answered.
    """

    def __init__(self, daemon: DaemonProxy) -> None:
        self._daemon = daemon
        self._quick = LONG if daemon.flags & ALLOW_INTERACTIVE else QUICK
        self._listening = Listening(daemon)

    async def close(self) -> None:
        """Close the connection. Code that waits for a job or an event gets Unavailable. A second call does nothing."""
        await self._listening.close()

    # ------------------------------------------------------------ live trees

    async def checkpoint(self, target: str, **options: Unpack[CheckpointOptions]) -> Job[CheckpointResult]:
        """Start to write an image of a tree."""
        return await self._start(_checkpointed, 'Checkpoint', 'sa{sv}', target, options)

    async def checkpoint_process(self, pidfd: int, **options: Unpack[CheckpointOptions]) -> Job[CheckpointResult]:
        """Start to write an image of the tree below the process behind a pidfd (pidfd_open(2))."""
        return await self._start(_checkpointed, 'CheckpointProcess', 'ha{sv}', pidfd, options)

    async def check(self, target: str, **options: Unpack[CheckOptions]) -> list[Finding]:
        """List every refusal and warning of a checkpoint. Nothing is frozen or written."""
        rows = await self._daemon.manager('Check', 'sa{sv}', target, options, seconds=LONG)
        return [finding_from(row) for row in rows]

    async def scan(self, target: str) -> list[TaskInfo]:
        """List the tasks of a tree in depth-first order."""
        rows = await self._daemon.manager('Scan', 'sa{sv}', target, {}, seconds=LONG)
        return [from_row(TaskInfo, row) for row in rows]

    async def freeze(self, target: str, **options: Unpack[FreezeOptions]) -> int:
        """Freeze a tree until `thaw`. Return the number of frozen tasks."""
        return int(await self._daemon.manager('Freeze', 'sa{sv}', target, options, seconds=LONG))

    async def thaw(self, target: str) -> None:
        """Thaw a tree that `freeze`, or a checkpoint with after='freeze', left frozen."""
        await self._daemon.manager('Thaw', 'sa{sv}', target, {}, seconds=LONG)

    async def inhibit(self, who: str, why: str, target: str = 'self') -> 'Inhibitor':
        """Delay checkpoints of this target until the inhibitor is closed, at most for InhibitDelayMaxSec. The event
        PrepareForCheckpoint announces a checkpoint."""
        return Inhibitor(await self._daemon.call_for_fd(ROOT, MANAGER, 'Inhibit', 'ssa{sv}', who, why,
                                                        {'target': target}, seconds=self._quick))

    async def list_inhibitors(self) -> list[InhibitorInfo]:
        return [InhibitorInfo(*row) for row in await self._daemon.manager('ListInhibitors')]

    # ------------------------------------------------------------ images

    async def restore(self, image: str, **options: Unpack[RestoreOptions]) -> Job[RestoreResult]:
        """Start to restore the tree of an image. With wait=True the job ends when the root of the tree does."""
        return await self._start(_restored, 'Restore', 'sa{sv}', image, _with_fds(options))

    async def check_restore(self, image: str, **options: Unpack[CheckRestoreOptions]) -> list[Finding]:
        """List every refusal and warning of such a restore. No process is made and nothing is changed."""
        rows = await self._daemon.manager('CheckRestore', 'sa{sv}', image, _with_fds(options), seconds=LONG)
        return [finding_from(row) for row in rows]

    async def list_images(self) -> list[ImageInfo]:
        rows = await self._daemon.manager('ListImages')
        return [from_row(ImageInfo, {'id': row['image'], **row}) for row in rows]

    async def image(self, id: str) -> 'Image':
        """Return the image of this id. NoSuchImage."""
        return Image(self, self._daemon, id, await self._daemon.manager('GetImage', 's', id))

    async def import_image(self, stream: int) -> 'Image':
        """Import a tar stream from an open fd: one of `Image.open`, or of `Image.export` with format 'tar'."""
        path = str(await self._daemon.manager('Import', 'ha{sv}', stream, {}, seconds=LONG))
        return Image(self, self._daemon, path.rpartition('/')[2], path)

    # ------------------------------------------------------------ jobs and events

    async def list_jobs(self) -> list[JobInfo]:
        """List jobs that are queued, running, or recently finished."""
        return [JobInfo(*row) for row in await self._daemon.manager('ListJobs')]

    async def job(self, id: int) -> Job[AnyResult]:
        """Return a job of the list. NoSuchJob."""
        hub = await self._listening.hub()
        row = next((row for row in await self.list_jobs() if row.id == id), None)
        if row is None:
            raise NoSuchJob(f'no job {id}')
        job: Job[AnyResult] = Job(self._daemon, hub, row.path, _RESULTS.get(row.operation, dict), id)
        try:
            job.settle(await self._daemon.job_properties(row.path))
        except BaseException:
            job.forget()
            raise
        return job

    async def info(self) -> ManagerInfo:
        return from_properties(ManagerInfo, await self._daemon.manager_properties())

    @contextlib.asynccontextmanager
    async def events(self, *kinds: type[Event]) -> AsyncIterator[Events]:
        """Receive the daemon's events from now on, of these kinds or of all.

            async with ckptd.events(JobNew, JobRemoved) as events:
                async for event in events:
                    print(event)
        """
        hub, events = await self._listening.hub(), Events(kinds)
        hub.join(events)
        try:
            yield events
        finally:
            hub.leave(events)

    async def _start(self, make: Make[R], method: str, signature: str, about: str | int,
                     options: Mapping[str, Any]) -> Job[R]:
        """Call a method that starts a job. Its path is known before the call, so its signals are received from the
        start."""
        token = options.get('handle_token') or new_token('client')
        hub = await self._listening.hub()
        job = Job(self._daemon, hub, token_path(self._daemon.client.connection.unique_name, token), make)
        try:
            await self._daemon.manager(method, signature, about, {**options, 'handle_token': token},
                                       seconds=self._quick)
            if not job.id:      # the signal JobNew was not for this client
                job.id = next((row.id for row in await self.list_jobs() if row.path == job.path), 0)
        except (asyncio.CancelledError, Unavailable):       # no answer came, or the caller stopped waiting
            job.abandon()
            raise
        except CkptError:
            job.forget()
            raise
        return job


class Image:
    """A published image. id: its name. path: the path of its object."""

    def __init__(self, ckptd: Ckptd, daemon: DaemonProxy, id: str, path: str) -> None:
        self._ckptd, self._daemon = ckptd, daemon
        self.id, self.path = id, path

    async def info(self) -> ImageDetails:
        return from_properties(ImageDetails, await self._daemon.image_properties(self.id), path=self.path)

    async def tree(self) -> list[TaskInfo]:
        """List the tasks that were dumped, as `Ckptd.scan` does."""
        return [from_row(TaskInfo, row) for row in await self._call('Tree')]

    async def verify(self) -> list[str]:
        """List the damages, one sentence each. The list of an intact image is empty."""
        return list(await self._call('Verify'))

    async def remove(self) -> None:
        """Remove the image. Busy while a job reads it."""
        await self._call('Remove')

    async def export(self, output: int, format: str = 'core') -> None:
        """Write a tar stream to an open fd, which the caller still owns: ELF files for 'core', the image itself for
        'tar'. Returns when all is written."""
        await self._call('Export', 'hsa{sv}', output, format, {})

    async def open(self) -> int:
        """Return an fd to read the image from as a tar stream; the caller closes it. `import_image` takes such a
        stream."""
        return await self._daemon.call_for_fd(self.path, IMAGE, 'Open', seconds=LONG)

    async def restore(self, **options: Unpack[RestoreOptions]) -> Job[RestoreResult]:
        """Start to restore the tree, as Ckptd.restore does."""
        return await self._ckptd.restore(self.id, **options)

    async def check_restore(self, **options: Unpack[CheckRestoreOptions]) -> list[Finding]:
        return await self._ckptd.check_restore(self.id, **options)

    async def _call(self, method: str, signature: str = '', *args: Any) -> Any:
        return await self._daemon.image(self.id, method, signature, *args, seconds=LONG)


class Inhibitor:
    """An inhibitor. It delays checkpoints while it is open: `with await ckptd.inhibit('editor', 'unsaved text'):
    ...`"""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the fd, -1 when closed."""
        return self._fd

    def close(self) -> None:
        """Release the inhibitor, so that checkpoints need not wait. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.close()


def _with_fds(options: RestoreOptions | CheckRestoreOptions) -> dict[str, Any]:
    """Convert the terminal and the sockets to UnixFds, which are passed as fds. A plain int would be passed as a
    number."""
    made: dict[str, Any] = {**options}
    if isinstance(terminal := options.get('terminal'), int):
        made['terminal'] = UnixFd(terminal)
    if 'inherit' in options:
        made['inherit'] = [(what, UnixFd(fd)) for what, fd in options['inherit']]
    return made


def _checkpointed(result: Mapping[str, Any]) -> CheckpointResult:
    return from_row(CheckpointResult, result)


def _restored(result: Mapping[str, Any]) -> RestoreResult:
    return from_row(RestoreResult, result)


_RESULTS: Final[Mapping[str, Make[AnyResult]]] = {'checkpoint': _checkpointed, 'restore': _restored}
