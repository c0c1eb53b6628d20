# SPDX-License-Identifier: LGPL-2.1-or-later
"""A task that is being made: a stub that executes batches of system calls, and the tracer's data about it.

All stubs have the same few pages at the same place, the arena, inherited from the first one:

    arena      one page of code (kernel/arch, STUB): walks the table of calls, then int3
    + PAGE     the table and its buffers; a stack, for calls that need one, ends at the arena's end

Tasks that share memory share the arena, so only one of them at a time can execute a batch: see `alone`.

A stub is born stopped (PTRACE_O_TRACECLONE and the like) and dies with its tracer (PTRACE_O_EXITKILL), so an
interrupted restart leaves nothing. Every signal but SIGTRAP is blocked in a stub.
"""

import ctypes
import os
import signal
import time
from typing import NamedTuple, Self, TypeVar

from ckptd.errors import CkptError
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.creds import SUID_DUMP_DISABLE
from ckptd.kernel.memory import PAGE, Mem, read_bytes, write_bytes
from ckptd.kernel.prctl import PR_SET_DUMPABLE
from ckptd.kernel.ptrace import (
    PTRACE_EVENT_CLONE,
    PTRACE_EVENT_FORK,
    PTRACE_EVENT_STOP,
    PTRACE_EVENT_VFORK,
    PTRACE_O_EXITKILL,
    PTRACE_O_TRACECLONE,
    PTRACE_O_TRACEEXEC,
    PTRACE_O_TRACEFORK,
    PTRACE_O_TRACESYSGOOD,
    PTRACE_O_TRACEVFORK,
    SYSCALL_STOP,
    Tracee,
)
from ckptd.kernel.reaping import wait_dead
from ckptd.remote.batch import Batch, Results, errno_of
from ckptd.remote.executor import Executor
from ckptd.remote.interleave import Steps, finish

T = TypeVar('T')

OPTIONS = (PTRACE_O_EXITKILL | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACEEXEC
           | PTRACE_O_TRACESYSGOOD)
BLOCK_ALL = (1 << 64) - 1 & ~(1 << signal.SIGTRAP - 1)
_BIRTHS = (PTRACE_EVENT_FORK, PTRACE_EVENT_VFORK, PTRACE_EVENT_CLONE)


class Arena(NamedTuple):
    """The addresses of the stubs' pages, the same in all."""
    start: int
    length: int
    code: int
    table: int
    room: int    # bytes for a batch

    @classmethod
    def at(cls, start: int, length: int) -> Self:
        """Lay out the arena. The last page is left for a stack."""
        return cls(start, length, start, start + PAGE, length - 2 * PAGE)

    @property
    def end(self) -> int:
        return self.start + self.length


def was_killed(tid: int) -> CkptError:
    return CkptError(f'task {tid} was killed while it was restored', task=tid,
                     hint='see the kernel log: it may have been short of memory')


class Turn:
    """A lock for the arena of an address space."""

    def __init__(self) -> None:
        self.taken = False


class Stub(Executor):
    """A stopped stub.

    turn: that of the task that it shares memory with. born: tids of the tasks that its last batch made, as we see them.
    is_dead: it has ended as one thread of several.
    """
    trap_signal = signal.SIGTRAP

    def __init__(self, tracee: Tracee, arena: Arena, turn: Turn | None = None) -> None:
        super().__init__(tracee, arena.table, arena.room)
        self.arena = arena
        self.turn = turn or Turn()
        self.born: list[int] = []
        self.is_dead = False

    @property
    def tid(self) -> int:
        return self.tracee.tid

    def do(self, batch: Batch) -> Results:
        """Let it execute a batch. OSError if a call fails; CkptError if it dies."""
        return finish(self.run(batch))

    def run(self, batch: Batch) -> Steps[Results]:
        """Let it execute a batch in steps, see interleave.py. OSError if a call fails; CkptError if it dies."""
        results = yield from self.attempt(batch)
        results.require()
        return results

    def attempt(self, batch: Batch) -> Steps[Results]:
        """Let it execute a batch in steps and return the results, whether calls failed or not."""
        return self.alone(self.execute(batch))

    def alone(self, work: Steps[T]) -> Steps[T]:
        """Do work with the arena. It begins when no other task of this address space uses the arena."""
        while self.turn.taken:
            yield
        self.turn.taken = True
        try:
            return (yield from work)
        finally:
            self.turn.taken = False

    def write(self, batch: Batch, at: int) -> None:
        """Put a batch into the arena, at an address of its own, for `go`."""
        self._write(at, batch.encode(at))

    def go(self, table: int) -> Steps[None]:
        """Run the code over the table at this address. This sets registers only, so the memory need not be dumpable."""
        self.born = []
        return self._run(arch.stub_registers(self.arena.code, table), arch.stub_trapped(self.arena.code))

    def run_code(self, code: bytes, data: bytes) -> Steps[None]:
        """Run code that ends in int3, once, with the address of the data in rbx."""
        return self.alone(self._run_code(code, data))

    def _run_code(self, code: bytes, data: bytes) -> Steps[None]:
        at = self.arena.code + PAGE // 2        # behind that of the stub
        with Mem(self.tid) as mem:
            mem.write(at, code)     # a page that is not writable, as a debugger writes it
        self._write(self.arena.table, data)
        yield from self._run(arch.stub_registers(at, self.arena.table), at + len(code))

    def wait(self) -> int:
        """Return the status of its next stop. CkptError if it died."""
        try:
            return self.tracee.wait()
        except ProcessLookupError as error:
            raise was_killed(self.tid) from error

    def _pass(self, status: int) -> int:
        """Note births, and pass stops caused by others: SIGSTOP cannot be blocked."""
        if status >> 16 in _BIRTHS:
            self.born.append(self.tracee.event_message())
        elif os.WSTOPSIG(status) in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL):
            raise CkptError(f'task {self.tid} got {signal.Signals(os.WSTOPSIG(status)).name} while it was restored',
                            task=self.tid)
        return 0

    def _write(self, at: int, data: bytes) -> None:
        write_bytes(self.tid, at, data)

    def _read(self, at: int, length: int) -> bytes:
        return read_bytes(self.tid, at, length)

    def die(self, status: int) -> None:
        """End it with a wait(2) status, and wait for its death. A parent other than the tracer may still wait for
        it."""
        if status & 0x7F:
            # The signal replaces the SIGTRAP that it has stopped for. Without dumpable memory no core is written, and
            # the program of core_pattern(5) is not run.
            batch = Batch()
            batch.call('prctl', PR_SET_DUMPABLE, SUID_DUMP_DISABLE, 0, 0, 0)
            self.write(batch, self.arena.table)
            finish(self.go(self.arena.table))       # only root may read the result of this call now
            self.tracee.sigmask = 0
            self.tracee.cont(status & 0x7F)
        else:
            self._begin('exit_group', status >> 8)
        wait_dead([self.tracee], self.tracee.patience)

    def exit_thread(self, status: int) -> None:
        """End it as one thread of several, with a wait(2) status that only /proc shows. The last thread's is that of
        the process.

        The tracer detaches first. A dead leader that is still traced when its tracer ends gets the SIGKILL of
        PTRACE_O_EXITKILL, which stays pending in it (kernel/ptrace.c, exit_ptrace). Also, its parent does not hear of
        the end of the process until the tracer has waited for it.
        """
        self._prepare('exit', status >> 8)
        tracee, began = self.tracee, time.monotonic()
        tracee.detach()
        while not tracee.has_died():
            tracee.patience(self.tid, time.monotonic() - began)
            os.sched_yield()
        self.is_dead = True

    def _begin(self, name: str, *arguments: int) -> None:
        """Start a call that does not return."""
        self._prepare(name, *arguments)
        self.tracee.cont()

    def _prepare(self, name: str, *arguments: int) -> None:
        """Set it up so that it next makes a call that does not return."""
        batch = Batch()
        batch.call(name, *arguments)
        self.write(batch, self.arena.table)
        self.tracee.regs = arch.stub_registers(self.arena.code, self.arena.table)
        self.tracee.sigmask = 0     # /proc continues to show the mask of the dead task

    def adopt(self, tid: int, *, shares_memory: bool) -> 'Stub':
        """Take over the task that was just born. It is already traced by us and about to stop."""
        tracee = Tracee(tid, self.tracee.patience)
        status = tracee.wait()
        if status >> 16 != PTRACE_EVENT_STOP:
            raise CkptError(f'task {tid} was born with status {status:#x}', task=tid)
        return Stub(tracee, self.arena, self.turn if shares_memory else None)

    def leave(self, last: Batch, *, unmap: bool) -> Steps[None]:
        """Execute the last calls, and unmap the arena unless others still use it. The task then stands wherever its
        registers are set to.

        It never runs from unmapped pages, nor into the int3: it stops at the entry and the end of each call. An
        interrupt that is pending at the last end makes it stop again where signals are handled. There the kernel
        restarts a call in which the task was interrupted, as for any task (arch_do_signal_or_restart).
        """
        if unmap:
            last.call('munmap', self.arena.start, self.arena.length)
        return self.alone(self._leave(last))

    def _leave(self, last: Batch) -> Steps[None]:
        if not len(last):
            return
        self.write(last, self.arena.table)
        tracee = self.tracee
        tracee.regs = arch.stub_registers(self.arena.code, self.arena.table)
        for _ in range(len(last)):
            yield from self.to_syscall()        # its entry
            yield from self.to_syscall()        # its end
            if number := errno_of(ctypes.c_int64(tracee.regs.rax).value):
                raise CkptError(f'task {self.tid} cannot leave its stub: {os.strerror(number)}', task=self.tid)
        yield from self.interrupt()

    def to_syscall(self) -> Steps[None]:
        """Run to the entry or the end of the next system call, whichever comes first."""
        self.tracee.to_syscall()
        yield
        while os.WSTOPSIG(self.wait()) != SYSCALL_STOP:
            self.tracee.to_syscall()

    def interrupt(self) -> Steps[None]:
        """Run with an interrupt pending, to the stop where signals are handled."""
        self.tracee.interrupt()
        self.tracee.cont()
        yield
        while self.wait() >> 16 != PTRACE_EVENT_STOP:
            self.tracee.cont()
