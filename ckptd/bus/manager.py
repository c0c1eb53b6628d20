# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.ckptd1.Manager at /org/ckptd1: the entry point. ckptd.jobs does the work."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from ckptd import __version__
from ckptd.bus.attach import attach
from ckptd.bus.authorizer import Authorizer, audit_call
from ckptd.bus.call import Call
from ckptd.bus.export import Exported, Viewer, method, property_, signal
from ckptd.bus.image import ROW_TYPES, TASK_TYPES
from ckptd.bus.job import path_of
from ckptd.bus.message import UnixFd
from ckptd.bus.names import MANAGER, image_path, token_path
from ckptd.bus.options import CHECK, CHECKPOINT, FREEZING, INHIBIT, NONE, SELF, parse_options
from ckptd.bus.restore import check_restore, restore
from ckptd.errors import InvalidArgument, NoSuchTarget
from ckptd.jobs.held_freezes import not_held
from ckptd.jobs.images import ImageService
from ckptd.jobs.inhibitors import InhibitorLock
from ckptd.jobs.queue import Queue
from ckptd.jobs.requests import RequestFactory, target_for
from ckptd.kernel.pidfd import pidfd_pid
from ckptd.protocol.requests import CheckRequest, ScanRequest
from ckptd.target import CALLER, AnyTarget, ProcessTarget, parse_target

TOGETHER = 1000         # images that are listed without a pause: each takes some 2 us
MAX_WORDS = 256         # characters of an inhibitor's description
IMAGE_TYPES = {'path': 'o', 'owner': 'u', 'tasks': 'u'}


class ManagerObject(Exported):
    interface = MANAGER

    def __init__(self, queue: Queue, request_factory: RequestFactory, image_service: ImageService,
                 authorizer: Authorizer) -> None:
        self._queue, self._request_factory = queue, request_factory
        self._image_service, self._authorizer = image_service, authorizer

    # ------------------------------------------------------------ trees

    @method('sa{sv}', 'o', names=('target', 'options', 'job'))
    async def Checkpoint(self, call: Call, target: str, options: dict[str, Any]) -> str:
        """Start a job that dumps the tree. Returns the path of the job."""
        return await self._checkpoint(call, parse_target(target), options)

    @method('ha{sv}', 'o', names=('pidfd', 'options', 'job'))
    async def CheckpointProcess(self, call: Call, pidfd: int, options: dict[str, Any]) -> str:
        """Start a job that dumps the process behind a pidfd and its tree. Returns the path of the job. Unlike a pid, a
        pidfd is never reused."""
        return await self._checkpoint(call, ProcessTarget(_pid_of(pidfd)), options, (pidfd,))

    @method('a{sv}', 's', names=('options', 'image'))
    async def CheckpointSelf(self, call: Call, options: dict[str, Any]) -> str:
        """Dump the tree of the caller. Returns the image once it is published. A caller restored from the image reads
        end-of-file from this bus instead of the answer."""
        given = parse_options(options, SELF)
        tree = await self._authorizer.tree(call, 'checkpoint', CALLER)
        traces = await self._authorizer.traces(call, tree.caller, tree.target, tree.start_time)
        request = self._request_factory.checkpoint(CALLER, tree.caller, asker=tree.asker, start_time=tree.start_time,
                                                   trace_under_yama=traces, **given)
        # with after=kill the caller leaves the bus because the checkpoint succeeded
        async with contextlib.nullcontext() if request.after == 'kill' else call.attended():
            return str((await self._queue.call(request))['image'])

    async def _checkpoint(self, call: Call, target: AnyTarget, options: dict[str, Any], fds: Sequence[int] = ()) -> str:
        given = parse_options(options, CHECKPOINT)
        token, detach = given.pop('handle_token', ''), given.pop('detach', False)
        tree = await self._authorizer.tree(call, 'checkpoint', target, as_root=given.get('as_root', False))
        if self._request_factory.stops_unit(target, given):
            await self._authorizer.stop(call, tree)
        traces = await self._authorizer.traces(call, tree.caller, tree.target, tree.start_time)
        request = self._request_factory.checkpoint(target, tree.caller, asker=tree.asker, start_time=tree.start_time,
                                                   trace_under_yama=traces, **given)
        job = self._queue.submit(request, fds, token and token_path(call.sender, token))
        if not detach:
            await attach(call, self._queue, job)
        return path_of(job)

    @method('sa{sv}', 'aa{sv}', names=('target', 'options', 'refusals'), types=ROW_TYPES)
    async def Check(self, call: Call, target: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """List every refusal and warning of a checkpoint. Nothing is frozen or written."""
        given, wanted = parse_options(options, CHECK), parse_target(target)
        caller = await call.credentials()
        traces = await self._authorizer.traces(call, caller, target_for(wanted, caller), interactive=False)
        request = self._request_factory.check(wanted, caller, trace_under_yama=traces, **given)
        return list((await self._look(call, request)).get('refusals', ()))

    @method('sa{sv}', 'aa{sv}', names=('target', 'options', 'tasks'), types=TASK_TYPES)
    async def Scan(self, call: Call, target: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """List the tasks of the tree in depth-first order."""
        parse_options(options, NONE)
        request = self._request_factory.scan(parse_target(target), await call.credentials())
        return list((await self._look(call, request)).get('tasks', ()))

    async def _look(self, call: Call, request: CheckRequest | ScanRequest) -> dict[str, Any]:
        audit_call('allowed', call, request.caller, request.about, 'looking')
        async with call.attended():
            return await self._queue.call(request)

    @method('sa{sv}', 'u', names=('target', 'options', 'tasks'))
    async def Freeze(self, call: Call, target: str, options: dict[str, Any]) -> int:
        """Freeze the tree until Thaw, or until the process given in the options ends. Returns the number of frozen
        tasks. After the reply the freeze outlives its caller."""
        given = parse_options(options, FREEZING)
        detach = given.pop('detach', False)
        wanted = parse_target(target)
        tree = await self._authorizer.tree(call, 'freeze', wanted)
        request = self._request_factory.hold(wanted, tree.caller, asker=tree.asker, start_time=tree.start_time, **given)
        async with contextlib.nullcontext() if detach else call.attended():
            return int((await self._queue.call(request)).get('tasks', 0))

    @method('sa{sv}', names=('target', 'options'))
    async def Thaw(self, call: Call, target: str, options: dict[str, Any]) -> None:
        """Thaw a tree that Freeze, or a checkpoint with after=freeze, left frozen."""
        parse_options(options, NONE)
        where = target_for(parse_target(target), await call.credentials())
        owner = self._queue.frozen.get(where)
        viewer = await self._authorizer.hold(call, where, owner)
        if self._queue.frozen.get(where) != owner:      # the freeze that the question was about has ended meanwhile
            raise not_held(where)
        await self._queue.thaw(where, viewer.sees)

    @method('ssa{sv}', 'h', names=('who', 'why', 'options', 'inhibitor'))
    async def Inhibit(self, call: Call, who: str, why: str, options: dict[str, Any]) -> UnixFd:
        """Delay checkpoints of a tree (option target, 'self' by default) until the returned file descriptor is closed,
        but at most for InhibitDelayMaxSec=. PrepareForCheckpoint tells when to close it."""
        target = parse_target(parse_options(options, INHIBIT).get('target', str(CALLER)))
        tree = await self._authorizer.tree(call, 'checkpoint', target)
        holder = InhibitorLock(who[:MAX_WORDS], why[:MAX_WORDS], tree.target, tree.asker, tree.caller.pid, call.sender)
        return UnixFd(self._queue.inhibit(holder, tree.start_time))

    @method('', 'a(sssuu)', names=('inhibitors',), long=True)
    async def ListInhibitors(self, call: Call) -> list[tuple[str, str, str, int, int]]:
        """List (who, why, target, uid, pid) of the inhibitors that are held."""
        viewer = await call.viewer()
        return [(one.who, one.why, str(one.target), one.uid, one.pid) for one in self._queue.inhibitors.held
                if viewer.sees(one.uid)]

    # ------------------------------------------------------------ images

    @method('sa{sv}', 'o', names=('image', 'options', 'job'))
    async def Restore(self, call: Call, image: str, options: dict[str, Any]) -> str:
        """Start a job that restores the tree of an image. Returns the path of the job."""
        return await restore(self._image_service, self._authorizer, call, image, options)

    @method('sa{sv}', 'aa{sv}', names=('image', 'options', 'refusals'), types=ROW_TYPES)
    async def CheckRestore(self, call: Call, image: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """List every refusal and warning of such a restore. No process is made and nothing is changed."""
        return await check_restore(self._image_service, self._authorizer, call, image, options)

    @method('', 'a(uosss)', names=('jobs',), long=True)
    async def ListJobs(self, call: Call) -> list[tuple[int, str, str, str, str]]:
        """List (id, path, operation, target, state) of jobs that are queued, running, or recently finished."""
        viewer = await call.viewer()
        return [(job.number, path_of(job), job.request.operation, job.request.about, job.state.value)
                for job in self._queue.jobs if viewer.sees(job.request.asked_by)]

    @method('', 'aa{sv}', names=('images',), types=IMAGE_TYPES, long=True)
    async def ListImages(self, call: Call) -> list[dict[str, Any]]:
        """List the images with their properties, oldest first."""
        viewer = await call.viewer()
        seen = [info for info in self._image_service.spool.images if viewer.sees(info.owner)]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(seen), TOGETHER):
            rows += [{'image': info.id, 'path': image_path(info.id), 'target': info.target, 'command': info.command,
                      'created': info.created, 'owner': info.owner, 'tasks': info.tasks, 'size': info.size}
                     for info in seen[start:start + TOGETHER]]
            await asyncio.sleep(0)      # let other calls run
        return rows

    @method('s', 'o', names=('image', 'path'))
    async def GetImage(self, call: Call, image: str) -> str:
        """Return the path of an image's object."""
        info = self._image_service.spool.get(image)

        def seen(viewer: Viewer) -> bool:
            return info is not None and viewer.sees(info.owner)

        if not seen(await call.viewer(seen)):
            await self._authorizer.image(call, 'manage', image)
        return image_path(self._image_service.spool.find(image).id)

    @method('s', 'as', names=('image', 'damages'))
    async def VerifyImage(self, call: Call, image: str) -> list[str]:
        """List the damages of an image, one sentence each. The list of an intact image is empty."""
        rights = await self._authorizer.image(call, 'manage', image)
        async with call.attended():
            return await self._image_service.verify(image, rights)

    @method('s', names=('image',))
    async def RemoveImage(self, call: Call, image: str) -> None:
        """Remove an image. Busy while a job reads it."""
        rights = await self._authorizer.image(call, 'manage', image)
        await self._image_service.remove(image, rights)

    @method('ha{sv}', 'o', names=('stream', 'options', 'image'))
    async def Import(self, call: Call, stream: int, options: dict[str, Any]) -> str:
        """Import an image from a tar stream, as Image.Open provides it. Returns once it is published. The image belongs
        to the caller, and a tree restored from it has no right that the caller lacks."""
        parse_options(options, NONE)
        uid = (await call.credentials()).uid
        caller = await self._authorizer.enter(call, 'manage', 'a new image', owner=uid)
        async with call.attended():
            return image_path(await self._image_service.take_in(stream, caller))

    JobNew = signal('uo', ('id', 'job'), doc='A job was queued or started.')
    JobRemoved = signal('uos', ('id', 'job', 'result'), doc='A job is over; the result is done, failed or '
                        'cancelled. Its object stays for a while.')
    ImageAdded = signal('so', ('image', 'path'), doc='An image was published.')
    ImageRemoved = signal('so', ('image', 'path'), doc='An image was removed.')
    PrepareForCheckpoint = signal('ob', ('job', 'start'), doc='A checkpoint is about to freeze its tree and waits for '
                                  'inhibitors (true), or it is over, with any result (false).')
    Restored = signal('su', ('image', 'tasks'), doc='A restored tree runs again; tasks is the number of its tasks.')

    @property_('s', emits='const')
    def Version(self) -> str:
        """Version of ckptd."""
        return __version__

    @property_('s', emits='const')
    def Spool(self) -> str:
        """Directory of the images."""
        return str(self._image_service.spool.directory)

    @property_('u', emits='invalidates')
    def Jobs(self, viewer: Viewer) -> int:
        """Number of queued and running jobs that the caller may see."""
        return sum(not job.over and viewer.sees(job.request.asked_by) for job in self._queue.jobs)

    @property_('u', emits='invalidates')
    def Images(self, viewer: Viewer) -> int:
        """Number of images that the caller may see."""
        return self._image_service.spool.usage(None if viewer.all or not viewer.uid else viewer.uid)[0]

    @property_('as', emits='invalidates')
    def FrozenTargets(self, viewer: Viewer) -> list[str]:
        """Targets that the daemon holds frozen until Thaw and that the caller may see."""
        return sorted(str(target) for target, uid in self._queue.frozen.items() if viewer.sees(uid))


def _pid_of(pidfd: int) -> int:
    """Return the process of a client's pidfd. InvalidArgument for another kind of fd, NoSuchTarget for a dead
    process."""
    try:
        pid = pidfd_pid(pidfd)
    except KeyError:
        raise InvalidArgument('the file descriptor is not a pidfd', resource='pidfd',
                              hint='see pidfd_open(2)') from None
    if pid <= 0:
        raise NoSuchTarget('the process of the pidfd is dead or in another pid namespace', resource='pidfd')
    return pid
