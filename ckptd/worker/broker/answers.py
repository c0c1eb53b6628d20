# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls that a broker answers for its worker (protocol/broker_calls.py), each checked against the job.

The worker is not trusted. It works on untrusted images with the rights of the user, who may stop or kill it at any
moment. So the broker checks every path and pid of the worker with the kernel.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ckptd.errors import CkptError, PermissionDenied
from ckptd.freezer import FrozenTree
from ckptd.image.archive.unpack import incoming
from ckptd.image.files import require_room
from ckptd.image.ids import is_image_id
from ckptd.image.manifest import NAME, read_manifest_of
from ckptd.image.source import DirectoryFiles
from ckptd.inspect.scan import scan_tree
from ckptd.journal.owner import StepJournal
from ckptd.journal.steps import EndUsersProcesses, KeepFile, LinkFile, RestartStep, TakeFromTerminal, WalkQueues
from ckptd.journal.store import Journal
from ckptd.kernel.status import read_status
from ckptd.operation.context import JobContext, image_path, require_some_room
from ckptd.operation.timers import OwnTimers
from ckptd.protocol.broker_calls import (
    MAX_FILES,
    BrokerCall,
    EndTaken,
    EndTree,
    EndWalk,
    FindWatched,
    FreezeTree,
    HoldTree,
    KeepContent,
    LetRun,
    NewImage,
    NoteStep,
    NoteTaken,
    NoteWalk,
    OpenImage,
    PlaceTree,
    Publish,
    ReadTimers,
    RestoreTree,
    StartTree,
    StopUnit,
)
from ckptd.protocol.requests import (
    CheckpointRequest,
    FreezerRequest,
    HoldRequest,
    ImageRequest,
    ImportRequest,
    JobRequest,
    RestoreRequest,
)
from ckptd.tree import Tree
from ckptd.worker.broker.identity import Identity
from ckptd.worker.broker.placement import TreePlace
from ckptd.worker.broker.users_image import UsersImage
from ckptd.worker.broker.watched import find_watched

log = logging.getLogger('ckptd.worker')

S = TypeVar('S', RestartStep, LinkFile, WalkQueues, TakeFromTerminal, EndUsersProcesses)
Reply = tuple[dict[str, object], list[int]]


class BrokerAnswers:
    """The answers to the calls of one job. `close` undoes what the worker leaves behind, however it ended."""

    def __init__(self, job: JobContext[JobRequest], identity: Identity, worker: int) -> None:
        self._job, self._identity = job, identity
        self._stack = ExitStack()
        self._freeze = ExitStack()
        self._frozen: FrozenTree | None = None
        self._incoming: UsersImage | None = None
        self._is_published = self._is_stopping = False
        restore = job.narrowed(RestoreRequest)
        self._place = TreePlace(restore, identity, worker) if restore else None
        steps = partial(StepJournal, Journal(Path(job.request.runtime)), job.request.job, job.request.about)
        self._names, self._walk, self._taken, self._ended = steps('names'), steps('walk'), steps('take'), steps('end')
        self._kept: set[str] = set()
        self._worker = worker
        self._timers, self._are_asleep = OwnTimers(), False
        self._answers: Mapping[type[BrokerCall], Callable[[Any], Reply]] = {
            OpenImage: self._open_image, NewImage: self._new_image, Publish: self._publish,
            FreezeTree: self._freeze_tree, LetRun: self._let_run, HoldTree: self._hold_tree,
            RestoreTree: self._restore_tree, StopUnit: self._stop_unit, EndTree: self._end_tree,
            ReadTimers: self._read_timers, FindWatched: self._find_watched, PlaceTree: self._place_tree,
            StartTree: self._start_tree, NoteStep: self._note, NoteWalk: self._note_walk, EndWalk: self._end_walk,
            NoteTaken: self._note_taken, EndTaken: self._end_taken, KeepContent: self._keep_content}

    def answer(self, call: BrokerCall) -> Reply:
        """Carry out a call. Return the value, and fds that the caller closes. CkptError, OSError."""
        return self._answers[type(call)](call)

    def check_room(self) -> None:
        """Check that the image being written leaves enough free space. SpoolFailed."""
        if self._incoming is not None:
            require_room(self._incoming.path, 0, self._writing().keep_free)

    def close(self) -> None:
        """Thaw the tree, end a tree that does not live yet, remove an unpublished image."""
        with ExitStack() as stack:      # each of them, whatever the others raise
            if self._incoming is not None:
                stack.callback(self._incoming.abort)
            stack.callback(self._names.close)
            if self._place is not None:
                stack.callback(self._place.close)
            stack.callback(self._freeze.close)
            stack.callback(self._undo, self._ended)
            stack.callback(self._undo, self._walk)
            stack.callback(self._undo, self._taken)

    # ------------------------------------------------------------ images

    def _open_image(self, call: OpenImage) -> Reply:
        job, uid = self._job.narrowed(ImageRequest), self._identity.uid
        if job is None:
            raise PermissionDenied('the job reads no image')
        path = image_path(job)
        files = DirectoryFiles(path)
        try:
            manifest = read_manifest_of(files)
            if manifest.owner_uid != uid and job.request.caller.uid:
                raise PermissionDenied(f'image {job.request.image} does not belong to uid {uid}',
                                       resource=job.request.image)
            names = sorted({NAME, *files.names()})
            chosen = names[call.first:call.first + MAX_FILES]
            with ExitStack() as undo:
                fds = []
                for name in chosen:
                    fds.append(files.open(name))
                    undo.callback(os.close, fds[-1])
                undo.pop_all()
            return {'names': chosen, 'more': call.first + MAX_FILES < len(names)}, fds
        finally:
            files.close()

    def _new_image(self, call: NewImage) -> Reply:
        request = self._writing()
        if self._incoming is not None:
            raise PermissionDenied('the job may not write another image')
        make, spool = partial(UsersImage, identity=self._identity), Path(request.spool)
        if isinstance(request, CheckpointRequest):
            require_some_room(spool, request.keep_free)
            self._incoming = make(spool, request.image)
        elif not is_image_id(call.image):
            raise PermissionDenied('the stream has no image id')
        else:
            self._incoming = incoming(spool, call.image, call.size, request.keep_free, keep_id=False, make=make)
        return {'image': self._incoming.image}, [self._incoming.duplicate()]

    def _writing(self) -> CheckpointRequest | ImportRequest:
        """Return the request of a job that writes an image. PermissionDenied for any other."""
        request = self._job.request
        if not isinstance(request, CheckpointRequest | ImportRequest):
            raise PermissionDenied('the job may not write an image')
        return request

    def _publish(self, call: Publish) -> Reply:
        if self._incoming is None:
            raise PermissionDenied('the job has no image to publish')
        self._incoming.take_back(self._writing())
        self._incoming, self._is_published = None, True
        self._names.finish()
        return {}, []

    # ------------------------------------------------------------ freeze

    def _freeze_tree(self, call: FreezeTree) -> Reply:
        job: JobContext[FreezerRequest] | None = (self._job.narrowed(CheckpointRequest)
                                                  or self._job.narrowed(HoldRequest))
        if self._frozen is not None or job is None:
            raise PermissionDenied('the job may not freeze, or not again')
        target = job.resolve()
        tree = scan_tree(target.roots)
        self._require_users(tree)
        self._frozen = self._freeze.enter_context(
            job.frozen(target, tree, remote_calls=call.remote_calls, traced=False))
        # a set-user-ID program may have been executed in between
        self._require_users(self._frozen.tree)
        return {'mode': self._frozen.mode, 'moved': self._frozen.moved}, []

    def _require_users(self, tree: Tree) -> None:
        """Check that every uid of every task is the user's. They may stop such tasks by SIGSTOP anyway.
        PermissionDenied."""
        for task in tree:
            try:
                status = read_status(task.tgid, task.tid)
            except ProcessLookupError:
                continue
            if {*status.uids} != {self._identity.uid}:
                raise PermissionDenied(f'{task.comm}[{task.tid}] does not belong to uid {self._identity.uid} only',
                                       task=task.tid, resource='uid', phase='freeze')

    def _tree(self) -> FrozenTree:
        if self._frozen is None:
            raise PermissionDenied('the job has frozen nothing')
        return self._frozen

    def _let_run(self, call: LetRun) -> Reply:
        self._tree().let_run()
        return {}, []

    def _hold_tree(self, call: HoldTree) -> Reply:
        self._tree().hold()
        return {}, []

    def _restore_tree(self, call: RestoreTree) -> Reply:
        self._tree().restore()
        return {}, []

    def _ending(self) -> JobContext[CheckpointRequest]:
        """Return a job that may end its tree now. PermissionDenied for any other."""
        job = self._job.narrowed(CheckpointRequest)
        if job is None or job.request.after != 'kill' or not self._is_published:
            raise PermissionDenied('the job may not end the tree, or has no image of it yet')
        return job

    def _stop_unit(self, call: StopUnit) -> Reply:
        if not (job := self._ending()).request.stop_unit:
            raise PermissionDenied('the job may not stop a unit')
        job.stop_unit()
        self._is_stopping = True
        return {}, []

    def _end_tree(self, call: EndTree) -> Reply:
        self._ending()
        if self._frozen is None and call.processes:
            for process in call.processes:
                self._require_tracee(process.pid)
            self._ended.note(self._with_ids(EndUsersProcesses(call.processes)))
            return {}, []
        frozen = self._tree()
        # a unit that is being stopped is ended by its manager, whatever it executes meanwhile
        if call.again or not self._is_stopping:
            frozen.hold()
        # it is frozen, so tasks that belong to the user now still do when it is ended
        self._require_users(frozen.tree)
        frozen.condemn(again=call.again or not self._is_stopping)
        return {}, []

    # ------------------------------------------------------------ timers

    def _read_timers(self, call: ReadTimers) -> Reply:
        if not isinstance(self._job.request, CheckpointRequest):
            raise PermissionDenied('the job is not a checkpoint')
        if call.asleep:
            for tid in call.asleep:
                self._require_tracee(tid)
            self._timers.asleep(call.asleep)
            self._are_asleep = True
            return {}, []
        if not self._are_asleep:
            self._timers.at_rest()
            return {'ends': []}, []
        self._are_asleep = False
        return {'ends': sorted(self._timers.ends())}, []

    def _require_tracee(self, tid: int) -> None:
        """Check that the task is the user's and that the worker traces it. PermissionDenied."""
        try:
            found = read_status(tid)
        except ProcessLookupError:
            found = None
        if found is None or found.tracer_pid != self._worker or {*found.uids} != {self._identity.uid}:
            raise PermissionDenied(f'task {tid} is not traced by the worker', task=tid, resource='ptrace')

    def _find_watched(self, call: FindWatched) -> Reply:
        if self._job.request.operation not in ('checkpoint', 'check'):
            raise PermissionDenied('the job does not look at open files')
        return find_watched(call, self._identity, self._worker), []

    # ------------------------------------------------------------ restored trees

    def _place_tree(self, call: PlaceTree) -> Reply:
        self._restoring().settle(call.processes)
        return {}, []

    def _start_tree(self, call: StartTree) -> Reply:
        return {'warnings': self._restoring().start()}, []

    def _restoring(self) -> TreePlace:
        """Return the place of the tree of a restore. PermissionDenied for another job."""
        if self._place is None:
            raise PermissionDenied('the job is not a restore')
        return self._place

    def _note(self, call: NoteStep) -> Reply:
        if isinstance(call.step, LinkFile):
            if self._incoming is None or not isinstance(self._job.request, CheckpointRequest):
                raise PermissionDenied('the job writes no image of a tree')
            image = str(self._incoming.spool / self._incoming.image)
            self._names.note(msgspec.structs.replace(self._with_ids(call.step), image=image))
            return {}, []
        self._restoring().note(self._owned(call.step))
        return {}, []

    def _note_walk(self, call: NoteWalk) -> Reply:
        if not isinstance(self._job.request, CheckpointRequest) or not self._walk.is_empty:
            raise PermissionDenied('the job walks no queues, or walks some already')
        self._walk.note(self._with_ids(call.step))
        return {}, []

    def _end_walk(self, call: EndWalk) -> Reply:
        self._walk.finish()
        return {}, []

    def _note_taken(self, call: NoteTaken) -> Reply:
        request = self._job.request
        if not isinstance(request, CheckpointRequest) or request.after != 'kill':
            raise PermissionDenied('the job takes nothing out of its tree')
        self._taken.note(self._with_ids(call.step))
        return {}, []

    def _end_taken(self, call: EndTaken) -> Reply:
        self._taken.finish()
        return {}, []

    @staticmethod
    def _undo(journal: StepJournal) -> None:
        """Undo the steps with the rights of the user, if the worker has ended before it has done so."""
        try:
            journal.close()
        except CkptError as error:
            log.warning('%s', error.message)

    def _owned(self, step: RestartStep) -> RestartStep:
        """Return the step with this user's ids; it will be undone with the rights of this user only."""
        if isinstance(step, KeepFile) and step.kept not in self._kept:
            raise PermissionDenied(f'{step.kept} is not a kept file', resource=step.kept)
        return self._with_ids(step)

    def _with_ids(self, step: S) -> S:
        identity = self._identity
        return msgspec.structs.replace(step, uid=identity.uid, gid=identity.gid, groups=identity.groups)

    def _keep_content(self, call: KeepContent) -> Reply:
        path, fd = self._restoring().keep_content()
        self._kept.add(path)
        return {'path': path}, [fd]
