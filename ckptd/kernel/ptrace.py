# SPDX-License-Identifier: LGPL-2.1-or-later
"""ptrace(2) with SEIZE. A Tracee belongs to the thread that seized it; any other thread gets ESRCH."""

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Self, TypeAlias

from ckptd.kernel.arch.x86_64 import GPR_SIZE, NT_XSTATE, user_regs_struct
from ckptd.kernel.decl import c_int, c_long, c_void_p, cstruct, libc, u32, u64
from ckptd.kernel.stat import read_stat

# <linux/ptrace.h>
PTRACE_CONT = 7
PTRACE_SYSCALL = 24
PTRACE_DETACH = 17
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_GETEVENTMSG = 0x4201
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_PEEKSIGINFO = 0x4209
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211
PTRACE_PEEKSIGINFO_SHARED = 1
PTRACE_EVENT_FORK = 1
PTRACE_EVENT_VFORK = 2
PTRACE_EVENT_CLONE = 3
PTRACE_EVENT_EXEC = 4
PTRACE_EVENT_STOP = 128
PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_TRACEFORK = 1 << PTRACE_EVENT_FORK
PTRACE_O_TRACEVFORK = 1 << PTRACE_EVENT_VFORK
PTRACE_O_TRACECLONE = 1 << PTRACE_EVENT_CLONE
PTRACE_O_TRACEEXEC = 1 << PTRACE_EVENT_EXEC
PTRACE_O_EXITKILL = 1 << 20
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
_RETURN = 1.0       # seconds; the return to the stop takes a moment, and a SIGCONT may come first
_LOOK = 0.05        # seconds without a stop after which a wait checks whether one can still come

NT_PRSTATUS = 1             # <elf.h>
WALL = 0x40000000           # __WALL: threads of other processes too
SIGINFO_SIZE = 128
SYSCALL_STOP = signal.SIGTRAP | 0x80     # of a task with PTRACE_O_TRACESYSGOOD
XSTATE_MAX = 16 << 10       # AMX has 11 KiB; the kernel returns what there is


@cstruct(size=16)
class iovec(ctypes.Structure):
    """<sys/uio.h>"""
    iov_base: u64
    iov_len: u64


@cstruct(size=24)
class ptrace_rseq_configuration(ctypes.Structure):
    """<linux/ptrace.h>, since 5.13"""
    rseq_abi_pointer: u64
    rseq_abi_size: u32
    signature: u32
    flags: u32
    pad: u32


@cstruct(size=16)
class ptrace_peeksiginfo_args(ctypes.Structure):
    """<linux/ptrace.h>, since 3.10"""
    off: u64
    flags: u32
    nr: u32


@cstruct(size=32)
class ptrace_sud_config(ctypes.Structure):
    """<linux/ptrace.h>, since 6.4"""
    mode: u64
    selector: u64
    offset: u64
    len: u64


@libc
def ptrace(request: c_int, pid: c_int, addr: c_void_p, data: c_void_p) -> c_long: ...


Patience: TypeAlias = Callable[[int, float], None]  # called with tid and seconds waited so far; raises to end the wait


def endless(tid: int, waited: float) -> None:
    """Wait without limit: only a stop or a death ends the wait."""


class Tracee:
    """A seized task. `with` detaches at the end. If the tracer dies, the kernel detaches the tracee.

    stop_signal: the signal of the group-stop (job control) that the task is in, else 0. deferred: signals that were
    about to be delivered while the task was borrowed; `detach` delivers them. patience: may end a wait.
    """

    def __init__(self, tid: int, patience: Patience = endless) -> None:
        self.tid = tid
        self.patience = patience
        self.stop_signal = 0
        self.deferred: list[int] = []
        self.stopped = False
        self.attached = True
        self.is_unreaped = False        # it is dead and cannot be waited for yet
        self._lasting = 0               # PTRACE_O_* that set_options keeps

    @classmethod
    def seize(cls, tid: int, options: int = 0, patience: Patience = endless) -> Self:
        """Attach without stopping. EPERM: not permitted, traced already, or a kernel thread; ESRCH: gone."""
        ptrace(PTRACE_SEIZE, tid, None, options)
        return cls(tid, patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def interrupt(self) -> None:
        """Request a stop; `wait` reports it."""
        ptrace(PTRACE_INTERRUPT, self.tid, None, None)

    def poll(self) -> int:
        """Return the status of a stop that has come, as in waitpid(2), or 0 if there is none. ProcessLookupError if the
        task died."""
        try:
            pid, status = os.waitpid(self.tid, os.WNOHANG | WALL)
        except ChildProcessError as error:
            self.attached = False
            raise ProcessLookupError(errno.ESRCH, f'task {self.tid} is gone') from error
        if not pid:
            return 0
        if not os.WIFSTOPPED(status):
            raise self._died()
        self.stopped = True
        if status >> 16 == PTRACE_EVENT_STOP:
            stop_signal = os.WSTOPSIG(status)
            self.stop_signal = 0 if stop_signal == signal.SIGTRAP else stop_signal
        return status

    def wait(self, deadline: float | None = None) -> int:
        """Return the status of the next stop. TimeoutError when the deadline (time.monotonic()) has passed; any error
        that `patience` raises. A SIGCHLD that is blocked in this thread ends the wait. If it is not blocked, the stop
        may be noticed up to _LOOK seconds late."""
        return self.poll() or self._wait_on(deadline)

    def _wait_on(self, deadline: float | None) -> int:
        began = now = time.monotonic()
        look = began + _LOOK
        while deadline is None or now < deadline:
            signal.sigtimedwait({signal.SIGCHLD}, max(0.0, min(look, deadline or look) - now))
            if status := self.poll():
                return status
            now = time.monotonic()
            if now >= look:
                self.require_alive()
                self.patience(self.tid, now - began)
                look = now + _LOOK
        raise TimeoutError(errno.ETIMEDOUT, f'task {self.tid} does not stop')

    def has_died(self) -> bool:
        """Whether the task has ended. waitpid(2) does not report a dead leader before its threads are reaped, and only
        the tracer reaps traced threads (kernel/exit.c, delay_group_leader)."""
        try:
            return read_stat(self.tid).state in 'ZX'
        except ProcessLookupError:
            return True

    def require_alive(self) -> None:
        """Check that it is alive. ProcessLookupError if it has died."""
        if self.has_died():
            self.reap()
            raise self._died()

    def _died(self) -> ProcessLookupError:
        self.attached = False
        return ProcessLookupError(errno.ESRCH, f'task {self.tid} died')

    def stop(self, deadline: float | None = None) -> None:
        """Interrupt and wait for PTRACE_EVENT_STOP. If a signal comes first, deliver it and interrupt again."""
        self.interrupt()
        while (status := self.wait(deadline)) >> 16 != PTRACE_EVENT_STOP:
            # any trap clears a pending interrupt (kernel/signal.c, ptrace_stop), so it must be requested again
            self.cont(os.WSTOPSIG(status))
            self.interrupt()

    def cont(self, sig: int = 0) -> None:
        ptrace(PTRACE_CONT, self.tid, None, sig)
        self.stopped = False

    def to_syscall(self, sig: int = 0) -> None:
        """Continue to the entry or exit of the next system call, whichever comes first. With PTRACE_O_TRACESYSGOOD that
        is a stop by SIGTRAP | 0x80."""
        ptrace(PTRACE_SYSCALL, self.tid, None, sig)
        self.stopped = False

    def set_options(self, options: int) -> None:
        """Set PTRACE_O_* for a stopped tracee."""
        ptrace(PTRACE_SETOPTIONS, self.tid, None, options | self._lasting)

    def suspend_seccomp(self) -> None:
        """Hide the calls of a stopped tracee from its seccomp filters until the end of the trace. EPERM without
        CAP_SYS_ADMIN or under a filter of our own."""
        self._lasting = PTRACE_O_SUSPEND_SECCOMP
        self.set_options(0)

    def event_message(self) -> int:
        """Return the message of the event that it stopped at: the new task's id, as the tracer sees it."""
        value = ctypes.c_ulong()
        ptrace(PTRACE_GETEVENTMSG, self.tid, None, ctypes.byref(value))
        return value.value

    def detach(self) -> None:
        """Detach. The task runs on, or stays in the group-stop that it was in. If it died meanwhile, do nothing."""
        if not self.attached:
            return
        self.attached = False
        first, *rest = self.deferred or [0]
        try:
            for sig in rest:
                os.kill(self.tid, sig)
            ptrace(PTRACE_DETACH, self.tid, None, first)
        except ProcessLookupError:
            # Dead or dying: reap it. Otherwise we, as its tracer, would hide the zombie from its parent.
            self.reap()

    def reap(self) -> None:
        """Wait for a dead task, if that is possible by now."""
        try:
            self.is_unreaped = os.waitpid(self.tid, os.WNOHANG | WALL)[0] == 0
        except ChildProcessError:
            self.is_unreaped = False

    # ------------------------------------------------------------ state of a stopped task

    def _regset(self, request: int, kind: int, buffer: ctypes.Array[ctypes.c_char] | user_regs_struct) -> int:
        vector = iovec(ctypes.addressof(buffer), ctypes.sizeof(buffer))
        ptrace(request, self.tid, kind, ctypes.byref(vector))
        return int(vector.iov_len)

    @property
    def regs(self) -> user_regs_struct:
        regs = user_regs_struct()
        if self._regset(PTRACE_GETREGSET, NT_PRSTATUS, regs) != GPR_SIZE:
            raise OSError(errno.EINVAL, f'task {self.tid} has 32-bit registers')
        return regs

    @regs.setter
    def regs(self, regs: user_regs_struct) -> None:
        self._regset(PTRACE_SETREGSET, NT_PRSTATUS, regs)

    def xstate(self) -> bytes:
        """Read all of FPU, SSE, AVX and later state, as XSAVE stores it (2,432 bytes with AVX-512)."""
        buffer = ctypes.create_string_buffer(XSTATE_MAX)
        size = self._regset(PTRACE_GETREGSET, NT_XSTATE, buffer)
        return buffer.raw[:size]        # `raw` is a copy: taken before the call it would hold zeros

    def set_xstate(self, area: bytes) -> None:
        """Write the state. EINVAL or EFAULT if the area does not have the size for this processor."""
        self._regset(PTRACE_SETREGSET, NT_XSTATE, ctypes.create_string_buffer(area, len(area)))

    @property
    def sigmask(self) -> int:
        """Blocked signals; bit n-1 is signal n. Inside sigsuspend(2) it is the mask that the call will restore."""
        mask = ctypes.c_uint64()
        ptrace(PTRACE_GETSIGMASK, self.tid, 8, ctypes.byref(mask))
        return mask.value

    @sigmask.setter
    def sigmask(self, value: int) -> None:
        mask = ctypes.c_uint64(value)
        ptrace(PTRACE_SETSIGMASK, self.tid, 8, ctypes.byref(mask))

    def is_stopped(self) -> bool:
        """Whether the tracee is stopped, as the kernel reports it. It leaves its stop only for its tracer, or to
        die."""
        try:
            return self.sigmask >= 0
        except ProcessLookupError:
            return False

    def pending(self, *, shared: bool) -> tuple[bytes, ...]:
        """Read the queued siginfo_t, of the process (shared) or of this thread, in queue order. Nothing is removed."""
        found: list[bytes] = []
        batch = 32
        buffer = ctypes.create_string_buffer(SIGINFO_SIZE * batch)
        while True:
            args = ptrace_peeksiginfo_args(len(found), PTRACE_PEEKSIGINFO_SHARED if shared else 0, batch)
            count = ptrace(PTRACE_PEEKSIGINFO, self.tid, ctypes.byref(args), buffer)
            found += [buffer.raw[i * SIGINFO_SIZE:(i + 1) * SIGINFO_SIZE] for i in range(count)]
            if count < batch:
                return tuple(found)

    def user_dispatch(self) -> ptrace_sud_config:
        """Return how system calls of the thread are redirected to its SIGSYS handler (Syscall User Dispatch). Mode 0:
        not at all, or the kernel cannot report it (< 6.4)."""
        config = ptrace_sud_config()
        try:
            ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, self.tid, ctypes.sizeof(config), ctypes.byref(config))
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EINVAL):
                raise
        return config

    def rseq(self) -> ptrace_rseq_configuration:
        """Return where the thread registered its struct rseq; all zero if it did not, or the kernel cannot report it (<
        5.13)."""
        config = ptrace_rseq_configuration()
        try:
            ptrace(PTRACE_GET_RSEQ_CONFIGURATION, self.tid, ctypes.sizeof(config), ctypes.byref(config))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        return config


def let_go(tracees: Iterable[Tracee]) -> None:
    """Detach from all. Tracees in job-control stop come first and re-enter that stop before any other runs. Until then
    they count as running, and a parent that asks for its stopped child would get none."""
    tracees = list(tracees)
    stopped = [tracee for tracee in tracees if tracee.stop_signal]
    for tracee in stopped:
        tracee.detach()
    deadline = time.monotonic() + _RETURN
    for tracee in stopped:
        while _is_running(tracee.tid) and time.monotonic() < deadline:
            os.sched_yield()        # there is no event: only its parent could wait for it
    for tracee in tracees:
        tracee.detach()
    # a dead leader comes after its threads, which have just been reaped
    for tracee in tracees:
        if tracee.is_unreaped:
            tracee.reap()


def _is_running(tid: int) -> bool:
    try:
        return read_stat(tid).state == 'R'
    except ProcessLookupError:
        return False
