# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carry out the steps of creation_order.py: make stubs with the pids, parents, sessions and groups of the future
tasks."""

import ctypes
import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from ckptd.errors import Busy, CkptError
from ckptd.kernel.clone import CLONE_INTO_CGROUP, CLONE_NEWPID, CLONE_PARENT, CLONE_THREAD, CLONE_VM, clone_args
from ckptd.kernel.decl import offset_of
from ckptd.kernel.prctl import PR_SET_CHILD_SUBREAPER
from ckptd.kernel.ptrace import WALL
from ckptd.operation.deadline import LONG
from ckptd.remote.batch import Batch
from ckptd.remote.stub import Stub, was_killed
from ckptd.restore.creation_order import SEED
from ckptd.restore.creation_steps import TEMPORARY, CreateTask, Dismiss, JoinGroup, NewSession, Step, Subreaper

_DYING_SECONDS = 2.0
_LOOK = 0.1         # seconds without SIGCHLD after which to check anyway


class TaskBuilder:
    """The stubs by vpid. `with` kills them, unless they are `released` and so independent.

    cgroup: an fd of the cgroup directory for the birth of processes, -1 for ours.
    """

    def __init__(self, bootstrap: Stub, cgroup: int) -> None:
        self.stubs: dict[int, Stub] = {SEED: bootstrap}
        self._cgroup = cgroup
        self.released = False
        self.init: Stub | None = None     # the first process of a new pid namespace, if it is not a task of the tree
        self._bootstrap: Stub | None = None
        self._is_init = False           # the bootstrap is the process 1 of the tree, or of its namespace
        self._first_flags = 0
        self._ours = {bootstrap.tid}         # tasks whose parent we are
        self.others: dict[int, Stub] = {}     # by tid: tasks outside of the tree

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if isinstance(error, OSError | CkptError) and error.errno == errno.ESRCH:
                self.require_all(time.monotonic() + _DYING_SECONDS)
        finally:
            self.kill()

    def __iter__(self) -> Iterator[tuple[int, Stub]]:
        return iter((vpid, stub) for vpid, stub in self.stubs.items() if vpid not in (SEED, TEMPORARY))

    def __getitem__(self, vpid: int) -> Stub:
        return self.stubs[vpid]

    def take(self, step: Step) -> None:
        match step:
            case CreateTask():
                self._spawn(step)
            case NewSession(vpid):
                self._do(vpid, 'setsid')
            case JoinGroup(vpid, vpgid):
                self._do(vpid, 'setpgid', 0, vpgid)
            case Subreaper(vpid, on):
                self._do(vpid, 'prctl', PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)
            case Dismiss(vpid, waiter):
                self.dismiss(vpid, waiter)

    def _do(self, vpid: int, name: str, *arguments: int) -> None:
        batch = Batch()
        batch.call(name, *arguments)
        self.stubs[vpid].do(batch)

    def _spawn(self, step: CreateTask) -> None:
        maker = self.stubs[step.maker]
        if self._is_init and step.vpid == 1:
            self.stubs[1] = maker
            return
        is_process = not step.flags & CLONE_THREAD
        into = CLONE_INTO_CGROUP if is_process and self._cgroup >= 0 and step.maker == SEED else 0
        child = self.clone(maker, step.vpid, step.flags | into | self._first_flags, step.exit_signal)
        self._first_flags = 0
        if step.flags & CLONE_PARENT and maker.tid in self._ours and is_process:
            self._ours.add(child.tid)
        self.stubs[step.vpid or TEMPORARY] = child

    def clone(self, maker: Stub, vpid: int, flags: int, exit_signal: int = 0) -> Stub:
        """Make a task with this pid, 0 for any. Busy if the pid is in use."""
        batch = Batch()
        number = batch.buffer(8, vpid.to_bytes(8, 'little'))
        args = clone_args(flags=flags, exit_signal=exit_signal, set_tid_size=1 if vpid else 0,
                          cgroup=self._cgroup if flags & CLONE_INTO_CGROUP else 0)
        buffer = batch.buffer(ctypes.sizeof(args), bytes(args))
        if vpid:
            batch.pointer(buffer.offset + offset_of(clone_args, 'set_tid'), number)
        batch.call('clone3', buffer, ctypes.sizeof(args))
        try:
            maker.do(batch)
        except OSError as error:
            raise self._cannot(vpid, error) from error
        [tid] = maker.born
        return maker.adopt(tid, shares_memory=bool(flags & CLONE_VM))

    def _cannot(self, vpid: int, error: OSError) -> CkptError:
        if error.errno == errno.EEXIST:
            return Busy(f'pid {vpid} was taken by another process meanwhile', resource=f'pid {vpid}',
                        hint='end that process, or restore with --new-pidns')
        hint = 'check the limits (ulimit -u, pids.max of the cgroup)' if error.errno == errno.EAGAIN else None
        return CkptError(f'cannot make process {vpid}: {error.strerror}', errno=error.errno, resource=f'pid {vpid}',
                         hint=hint)

    # ------------------------------------------------------------ a namespace of its own

    def new_namespace(self, *, own_init: bool, child_of_us: bool, is_bootstrap: bool) -> None:
        """Let the bootstrap make its children in a new pid namespace. own_init: the first root is its process 1.
        is_bootstrap: the bootstrap is already in a new namespace, as its process 1."""
        if is_bootstrap:
            self._is_init = True
            if not own_init:
                self.init = self.stubs[SEED]
                self.others[self.init.tid] = self.init
            return
        self._bootstrap = self.stubs[SEED]
        if own_init:
            self._first_flags = CLONE_NEWPID
            return
        self.init = self.clone(self._bootstrap, 0, CLONE_NEWPID | (CLONE_PARENT if child_of_us else 0),
                               0 if child_of_us else signal.SIGCHLD)
        self.others[self.init.tid] = self.init
        self.others[self._bootstrap.tid] = self._bootstrap
        self.stubs[SEED] = self.init

    def end_bootstrap(self) -> None:
        """End the bootstrap after all roots are made. They become children of the subreaper, unless they are ours."""
        if not self._is_init:
            bootstrap = self._bootstrap or self.stubs[SEED]
            bootstrap.die(0)
            self.others.pop(bootstrap.tid, None)
        del self.stubs[SEED]

    # ------------------------------------------------------------ ends

    def require_all(self, deadline: float = 0.0) -> None:
        """Check that no stub was killed, for example by the kernel when memory is short. CkptError. deadline: of
        time.monotonic(), check again until then."""
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL)) is None:
            if time.monotonic() >= deadline:
                return
            os.sched_yield()
        raise was_killed(dead.si_pid)

    def require_stopped(self) -> None:
        """Check that all stubs are stopped, before they are released. CkptError if one was killed.

        A killed task leaves its stop at once, but can be waited for only when all threads of its process are dead.
        """
        self.require_all()
        for _, stub in self:
            if not stub.is_dead and not stub.tracee.is_stopped():
                raise was_killed(stub.tid)

    def dismiss(self, vpid: int, waiter: int) -> None:
        """End a temporary process and let its parent reap it."""
        stub = self.stubs.pop(vpid)
        stub.die(0)
        if stub.tid not in self._ours:
            number = vpid if vpid > 0 else -1
            self._do(waiter, 'wait4', number, 0, WALL, 0)

    def kill(self) -> None:
        """Send SIGKILL to all tasks that were not released, and wait until they are dead."""
        if self.released:
            return
        for stub in [*self.stubs.values(), *self.others.values()]:
            _kill(stub.tid)
        # in any order: a leader cannot be waited for before its threads
        deadline = time.monotonic() + LONG
        with suppress(ChildProcessError):
            while (left := deadline - time.monotonic()) > 0:
                tid, status = os.waitpid(-1, WALL | os.WNOHANG)
                if not tid:
                    signal.sigtimedwait({signal.SIGCHLD}, min(left, _LOOK))
                elif os.WIFSTOPPED(status):
                    _kill(tid)      # it was born at the moment of the failure


def _kill(tid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(tid, signal.SIGKILL)
