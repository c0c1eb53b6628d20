# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carries out the steps of family.py: stubs with the numbers, parents, sessions and groups of the tasks to be."""

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
_LOOK = 0.1         # seconds without SIGCHLD after which to look anyway


class TaskBuilder:
    """The stubs by vpid. `with` kills them, unless they are `released`: tasks of their own now.

    cgroup: an fd of the directory that processes are born into, -1 for ours.
    """

    def __init__(self, bootstrap: Stub, cgroup: int) -> None:
        self.stubs: dict[int, Stub] = {SEED: bootstrap}
        self._cgroup = cgroup
        self.released = False
        self.init: Stub | None = None     # the first process of a namespace of its own, if it is no task of the tree
        self._bootstrap: Stub | None = None
        self._is_init = False           # the bootstrap is the process 1 of the tree, or of its namespace
        self._first_flags = 0
        self._ours = {bootstrap.tid}         # those whose parent we are
        self.others: dict[int, Stub] = {}     # by tid: what is no task of the tree

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
        """A new task of that number, 0 for any. Busy if somebody has it."""
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
            return Busy(f'pid {vpid} has come into use meanwhile', resource=f'pid {vpid}',
                        hint='end that process, or restore with --new-pidns')
        hint = 'see limits on processes (ulimit -u, pids.max of the cgroup)' if error.errno == errno.EAGAIN else None
        return CkptError(f'process {vpid} cannot be made: {error.strerror}', errno=error.errno, resource=f'pid {vpid}',
                         hint=hint)

    # ------------------------------------------------------------ a namespace of its own

    def new_namespace(self, *, own_init: bool, child_of_us: bool, is_bootstrap: bool) -> None:
        """Have the seed make its children in a new pid namespace. own_init: the first root is process 1 of it. is_seed:
        the seed is in a new namespace already, as process 1."""
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
        """All roots are there. They go to whoever takes orphans, unless they are ours."""
        if not self._is_init:
            bootstrap = self._bootstrap or self.stubs[SEED]
            bootstrap.die(0)
            self.others.pop(bootstrap.tid, None)
        del self.stubs[SEED]

    # ------------------------------------------------------------ ends

    def require_all(self, deadline: float = 0.0) -> None:
        """CkptError if one was killed, by the kernel short of memory say. deadline: of time.monotonic(), to look again
        until then."""
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
        """End a process of the nursery, and have its parent forget it."""
        stub = self.stubs.pop(vpid)
        stub.die(0)
        if stub.tid not in self._ours:
            number = vpid if vpid > 0 else -1
            self._do(waiter, 'wait4', number, 0, WALL, 0)

    def kill(self) -> None:
        """SIGKILL to all, and see them dead, unless they have been let go of."""
        if self.released:
            return
        for stub in [*self.stubs.values(), *self.others.values()]:
            _kill(stub.tid)
        # in whatever order they go: a leader is not waited for before its threads are
        deadline = time.monotonic() + LONG
        with suppress(ChildProcessError):
            while (left := deadline - time.monotonic()) > 0:
                tid, status = os.waitpid(-1, WALL | os.WNOHANG)
                if not tid:
                    signal.sigtimedwait({signal.SIGCHLD}, min(left, _LOOK))
                elif os.WIFSTOPPED(status):
                    _kill(tid)      # born in the moment that the restart broke off


def _kill(tid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(tid, signal.SIGKILL)
