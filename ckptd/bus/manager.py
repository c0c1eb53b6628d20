# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.ckptd1.Manager at /org/ckptd1: the way in. What it does is in ckptd.jobs."""

from collections.abc import Sequence
from typing import Any

from ckptd import __version__
from ckptd.bus.export import Exported, method, property_, signal
from ckptd.bus.image import ROW_TYPES, TASK_TYPES
from ckptd.bus.job import path_of
from ckptd.bus.names import MANAGER, image_path, token_path
from ckptd.bus.options import CHECK, CHECKPOINT, FREEZING, NONE, SELF, Option, parse_options
from ckptd.bus.restore import check_restore, restore
from ckptd.bus.router import Call
from ckptd.engine.messages import Operation
from ckptd.errors import InvalidArgument, NoSuchTarget
from ckptd.jobs.library import Library
from ckptd.jobs.orders import Orders, parse_target
from ckptd.jobs.queue import Queue
from ckptd.kernel.pidfd import pidfd_pid

IMAGE_TYPES = {'path': 'o', 'owner': 'u', 'tasks': 'u'}


class ManagerObject(Exported):
    interface = MANAGER

    def __init__(self, queue: Queue, orders: Orders, library: Library) -> None:
        self._queue, self._orders, self._library = queue, orders, library

    @method('sa{sv}', 'o', names=('target', 'options', 'job'))
    async def Checkpoint(self, call: Call, target: str, options: dict[str, Any]) -> str:
        """Start a job that dumps the tree; the path of its object."""
        return await self._checkpoint(call, target, options)

    @method('ha{sv}', 'o', names=('pidfd', 'options', 'job'))
    async def CheckpointProcess(self, call: Call, pidfd: int, options: dict[str, Any]) -> str:
        """The same for the process behind a pidfd, which cannot become another one meanwhile."""
        return await self._checkpoint(call, f'pid:{_pid_of(pidfd)}', options, (pidfd,))

    @method('a{sv}', 's', names=('options', 'image'))
    async def CheckpointSelf(self, call: Call, options: dict[str, Any]) -> str:
        """Dump the tree of the caller; answered when the image, its result, is published. Restored from it, the caller
        reads end-of-file from this bus instead of the answer."""
        given = parse_options(options, SELF)
        request = self._orders.on_target('checkpoint', 'self', await call.credentials(), **given)
        # not attended: with after=kill the caller leaves the bus because all went well
        return str((await self._queue.call(request))['image'])

    async def _checkpoint(self, call: Call, target: str, options: dict[str, Any], fds: Sequence[int] = ()) -> str:
        given = parse_options(options, CHECKPOINT)
        token = given.pop('handle_token', '')
        request = self._orders.on_target('checkpoint', target, await call.credentials(), has_pidfd=bool(fds), **given)
        return path_of(self._queue.submit(request, fds, token and token_path(call.sender, token)))

    @method('sa{sv}', 'aa{sv}', names=('target', 'options', 'refusals'), types=ROW_TYPES)
    async def Check(self, call: Call, target: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Every refusal and warning that a checkpoint would have; nothing is frozen or written."""
        return list((await self._ask('check', call, target, options, CHECK)).get('refusals', ()))

    @method('sa{sv}', 'aa{sv}', names=('target', 'options', 'tasks'), types=TASK_TYPES)
    async def Scan(self, call: Call, target: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """The tasks of the tree in depth-first order."""
        return list((await self._ask('scan', call, target, options, NONE)).get('tasks', ()))

    @method('sa{sv}', 'u', names=('target', 'options', 'tasks'))
    async def Freeze(self, call: Call, target: str, options: dict[str, Any]) -> int:
        """Freeze the tree, and keep it so until Thaw; how many tasks stand still."""
        return int((await self._ask('freeze', call, target, options, FREEZING)).get('tasks', 0))

    async def _ask(self, operation: Operation, call: Call, target: str, options: dict[str, Any],
                   known: tuple[Option, ...]) -> dict[str, Any]:
        given = parse_options(options, known)
        request = self._orders.on_target(operation, target, await call.credentials(), **given)
        async with call.attended():
            return await self._queue.call(request)

    @method('sa{sv}', names=('target', 'options'))
    async def Thaw(self, call: Call, target: str, options: dict[str, Any]) -> None:
        """Let go of what Freeze, or a checkpoint with after=freeze, left frozen."""
        parse_options(options, NONE)
        caller = await call.credentials()
        await self._queue.thaw(parse_target(target, caller), caller.uid)

    @method('sa{sv}', 'o', names=('image', 'options', 'job'))
    async def Restore(self, call: Call, image: str, options: dict[str, Any]) -> str:
        """Start a job that brings the tree of an image back; the path of its object."""
        return await restore(self._library, call, image, options)

    @method('sa{sv}', 'aa{sv}', names=('image', 'options', 'refusals'), types=ROW_TYPES)
    async def CheckRestore(self, call: Call, image: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Every refusal and warning that such a restore would have; no process is made and nothing changed."""
        return await check_restore(self._library, call, image, options)

    @method('', 'a(uosss)', names=('jobs',))
    async def ListJobs(self, call: Call) -> list[tuple[int, str, str, str, str]]:
        """(id, path, operation, target, state) of jobs that wait, work, or ended a moment ago."""
        return [(job.number, path_of(job), job.request.operation, job.request.target, job.state.value)
                for job in self._queue.jobs]

    @method('', 'aa{sv}', names=('images',), types=IMAGE_TYPES)
    async def ListImages(self, call: Call) -> list[dict[str, Any]]:
        return [{'image': info.id, 'path': image_path(info.id), 'target': info.target, 'command': info.command,
                 'created': info.created, 'owner': info.owner, 'tasks': info.tasks, 'size': info.size}
                for info in self._library.spool.images]

    @method('s', 'o', names=('image', 'path'))
    async def GetImage(self, call: Call, image: str) -> str:
        return image_path(self._library.spool.find(image).id)

    @method('s', 'as', names=('image', 'damages'))
    async def VerifyImage(self, call: Call, image: str) -> list[str]:
        """What is wrong with an image, one sentence each; nothing for one that is whole."""
        async with call.attended():
            return await self._library.verify(image, await call.credentials())

    @method('s', names=('image',))
    async def RemoveImage(self, call: Call, image: str) -> None:
        await self._library.remove(image, await call.credentials())

    JobNew = signal('uo', ('id', 'job'))
    JobRemoved = signal('uos', ('id', 'job', 'result'))
    ImageAdded = signal('so', ('image', 'path'))
    ImageRemoved = signal('so', ('image', 'path'))

    @property_('s', emits='const')
    def Version(self) -> str:
        return __version__

    @property_('s', emits='const')
    def Spool(self) -> str:
        return str(self._library.spool.directory)

    @property_('u')
    def Jobs(self) -> int:
        """How many wait or work."""
        return sum(not job.over for job in self._queue.jobs)

    @property_('u')
    def Images(self) -> int:
        return len(self._library.spool)

    @property_('as')
    def FrozenTargets(self) -> list[str]:
        """What the daemon holds frozen, for Thaw."""
        return self._queue.frozen_targets


def _pid_of(pidfd: int) -> int:
    """The process of a client's pidfd. InvalidArgument for another kind of fd, NoSuchTarget for a dead process."""
    try:
        pid = pidfd_pid(pidfd)
    except KeyError:
        raise InvalidArgument('the file descriptor is no pidfd', resource='pidfd', hint='see pidfd_open(2)') from None
    if pid <= 0:
        raise NoSuchTarget('the process of the pidfd is dead, or in no pid namespace of ckptd', resource='pidfd')
    return pid
