# SPDX-License-Identifier: LGPL-2.1-or-later
"""Remote system calls: a stopped task executes a batch of calls, which costs one stop in all.

    batch = Batch()
    out = batch.buffer(32)                      32 bytes of the tracee's memory, for a result
    call = batch.call('rt_sigaction', 2, 0, out, 8)

    remote = Remote(tracee, ids, mappings, caught)      one per address space
    def work() -> Steps[None]:                  waits are yields, see interleave.py
        yield from remote.open()
        results = yield from remote.run(tracee, ids, batch)
        results.value(call), results.data(out)
        yield from remote.close()

The code lies in unused bytes of an executable private mapping: the zeros behind the end of the vdso, or of any other
text page. No other code runs there, so a tracer that dies does no damage, and the task repairs itself (see
kernel/arch/x86_64.py). The table of calls and the buffers lie in pages that the first remote call maps and the last one
unmaps.
"""

import ctypes
import os
import signal
import struct
from collections.abc import Iterable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE
from typing import NamedTuple, Self

from ckptd.errors import CkptError, NotSupported
from ckptd.faults import fault
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.maps import Mapping
from ckptd.kernel.memory import PAGE, Mem
from ckptd.kernel.ptrace import PTRACE_EVENT_STOP, Tracee
from ckptd.kernel.status import read_status
from ckptd.remote.batch import Batch, Results, errno_of
from ckptd.remote.executor import Executor
from ckptd.remote.interleave import Steps

AREA_PAGES = 8
CODE_ROOM = 512             # bytes of code, rounded up
# rseq_cs of struct rseq, <linux/rseq.h>; start_ip, post_commit_offset and abort_ip of struct rseq_cs
_RSEQ_CS = 8
_ALL_ONES = 2**64 - 1
_QUIET = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)      # ignored by default, signal(7)


class OwnIds(NamedTuple):
    """A task's ids in its own pid namespace."""
    tgid: int
    tid: int


def find_room(mem: Mem, mappings: Iterable[Mapping]) -> int:
    """Find CODE_ROOM unused bytes in an executable private mapping: in the vdso first, then in any text."""
    text = [m for m in mappings if m.execute and not m.shared and m.path != '[vsyscall]']
    for mapping in sorted(text, key=lambda m: m.path != '[vdso]'):
        address = (mapping.end - CODE_ROOM) & ~15
        try:
            if not mem.read(address, mapping.end - address).strip(b'\0'):
                return address
        except OSError:
            continue    # a text page behind the end of its file
    raise NotSupported(f'process {mem.pid} has no room for remote calls: no vdso and no text page that ends in zeros',
                       task=mem.pid, resource='vdso')


class CallMemory(NamedTuple):
    """The memory that remote calls use in an address space."""
    mem: Mem
    code: int       # address of the code
    area: int       # address of the pages for calls and buffers, 0 while there are none
    length: int     # of these pages


class Remote:
    """System calls in one address space, through any stopped thread of it, one at a time.

    Once opened it must be closed, on failure too: by `close` or, where nothing can be yielded, by finish(close()).
    caught: signals with a handler, bit n-1 is signal n.
    """

    def __init__(self, tracee: Tracee, ids: OwnIds, mappings: Iterable[Mapping], caught: int) -> None:
        self._tracee, self._ids = tracee, ids
        self._caught, self._result = caught, 0
        self._is_lost = False       # a task has not returned from a call and may still run the code
        mem = Mem(tracee.tid)
        try:
            self._memory = CallMemory(mem, find_room(mem, mappings), 0, AREA_PAGES * PAGE)
        except BaseException:
            mem.close()
            raise

    @property
    def area(self) -> int:
        """Address of the pages for calls and buffers, 0 while there are none."""
        return self._memory.area

    def open(self) -> Steps[None]:
        """Map the pages for calls and buffers."""
        length = self._memory.length
        arguments = (0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, _ALL_ONES, 0)
        try:
            yield from self._single('mmap', arguments)
        finally:
            # also if the others failed and this generator is closed: the pages exist, and `close` unmaps them
            self._memory = self._memory._replace(area=max(self._result, 0))
        if error := errno_of(self._result):
            tid = self._tracee.tid
            raise CkptError(f'process {tid} gets no memory for remote calls: mmap of {length >> 10} KiB:'
                            f' {os.strerror(error)}', errno=error, task=tid, resource='mmap', phase='state',
                            hint=f'raise its limits meanwhile: prlimit --pid {tid} --as= --data= (and --memlock= after'
                                 ' mlockall), or vm.max_map_count')
        fault('remote-mapped')

    def close(self) -> Steps[None]:
        """Unmap the pages, and restore the zeros where the code was. A killed process has nothing to undo. A task that
        has not returned from a call undoes it by itself when its tracer is gone."""
        mem, code, area, length = self._memory
        self._memory = self._memory._replace(area=0)
        if self._is_lost:
            mem.close()
            return
        try:
            try:
                if area and self._tracee.attached:
                    yield from self._single('munmap', (area, length))
            finally:
                if not self._is_lost:
                    mem.write(code, bytes(CODE_ROOM))
        except OSError:
            if self._tracee.attached and read_status(self._tracee.tid).state not in 'ZX':
                raise
        finally:
            mem.close()

    def run(self, tracee: Tracee, ids: OwnIds, batch: Batch) -> Steps[Results]:
        """Let the task execute all calls of the batch. Its state afterwards is unchanged."""
        with _Borrowed(tracee, ids, self._memory, self._caught) as borrowed:
            try:
                return (yield from borrowed.execute(batch))
            finally:
                self._is_lost |= borrowed.is_lost

    def _single(self, name: str, arguments: tuple[int, ...]) -> Steps[None]:
        """Make one call without the table. `_result` is then its result or -errno; 0 if it was not made."""
        self._result = 0
        with _Borrowed(self._tracee, self._ids, self._memory, self._caught) as borrowed:
            try:
                yield from borrowed.call(name, arguments)
            finally:
                self._is_lost |= borrowed.is_lost
                self._result = borrowed.result


class _Borrowed(Executor):
    """A stopped task lent for remote calls. Registers, signal mask and rseq are restored at the end.

    While it runs, every signal but one is blocked. That one, ignored by default and without a handler, is the trap.
    """
    must_return = True

    def __init__(self, tracee: Tracee, ids: OwnIds, memory: CallMemory, caught: int) -> None:
        super().__init__(tracee, memory.area, memory.length)
        self._ids, self._memory, self._mem = ids, memory, memory.mem
        self.regs = tracee.regs
        if self.regs.cs != arch.CS_64:
            raise NotSupported(f'task {tracee.tid} runs 32-bit code', task=tracee.tid, resource='architecture')
        self.mask = tracee.sigmask
        self.trap_signal = self._choose_signal(caught)
        self._rseq_at, self._rseq_cs = self._rseq()

    def _choose_signal(self, caught: int) -> int:
        """Choose a signal that has no handler and is not pending: as it is unblocked for the trap, a pending one would
        be taken off its queue. A signal that is neither blocked nor caught is never pending, as the kernel drops it
        (kernel/signal.c, sig_ignored)."""
        free = [sig for sig in _QUIET if not (caught | self.mask) >> sig - 1 & 1]
        if free:
            return free[0]
        status = read_status(self.tracee.tid)
        pending = status.sig_pnd | status.shd_pnd
        # if each of them has a handler, a task whose tracer dies right now runs one of the handlers once
        return min(_QUIET, key=lambda sig: (pending >> sig - 1 & 1, caught >> sig - 1 & 1))

    def _rseq(self) -> tuple[int, int]:
        config = self.tracee.rseq()
        if not config.rseq_abi_pointer:
            return 0, 0
        at = config.rseq_abi_pointer + _RSEQ_CS
        return at, struct.unpack('<Q', self._mem.read(at, 8))[0]

    @property
    def resume(self) -> arch.user_regs_struct:
        """Return the registers with which a task without a tracer continues. Inside a restartable sequence, it
        continues at the abort handler."""
        if not self._rseq_cs:
            return self.regs
        start, length, abort = struct.unpack('<8x3Q', self._mem.read(self._rseq_cs, 32))
        regs = arch.user_regs_struct.from_buffer_copy(self.regs)
        if start <= regs.rip < start + length:
            regs.rip = abort
        return regs

    @property
    def is_lost(self) -> bool:
        """Whether it lives and has not returned."""
        return self.tracee.attached and not self.tracee.stopped

    @property
    def result(self) -> int:
        """The result of `call`, which is negative if it failed; 0 if it was not made."""
        return ctypes.c_int64(self._trapped.r15).value if self._trapped else 0

    def __enter__(self) -> Self:
        return self

    def go(self, table: int) -> Steps[None]:
        code = arch.loop_code(self.resume, self.mask, *self._ids, self.trap_signal)
        return self._run_code(code, table, table, self._memory.length)

    def call(self, name: str, arguments: tuple[int, ...]) -> Steps[None]:
        """Make one call without the table."""
        code = arch.boot_code(arch.NR[name], arguments, self.resume, self.mask, *self._ids, self.trap_signal)
        # r14 is the length that a task without a tracer unmaps at r15, the result: only right after mmap
        return self._run_code(code, 0, 0, self._memory.length if name == 'mmap' else 0)

    def _run_code(self, code: bytes, table: int, area: int, length: int) -> Steps[None]:
        """Run code whose end restores the task by itself. A task without a tracer unmaps the area."""
        at = self._memory.code
        self._write(at, code)
        return self._run(arch.start_registers(self.regs, at, table, area, length), at + arch.trap_offset(code))

    def _set_state(self, regs: arch.user_regs_struct) -> None:
        self.tracee.sigmask = _ALL_ONES & ~(1 << self.trap_signal - 1)
        super()._set_state(regs)
        fault('running-remote')

    def _pass(self, status: int) -> int:
        """Pass other stops. A group-stop shows itself and leaves the task to its tracer. So does one that begins now,
        since SIGSTOP cannot be blocked. A trap signal from another process, which is not blocked either, is kept for
        the task."""
        if status >> 16 == PTRACE_EVENT_STOP:
            return 0
        sig = os.WSTOPSIG(status)
        if sig == signal.SIGSTOP:
            return sig      # the kernel must know of it, so that a SIGCONT that comes now cancels it
        if sig == self.trap_signal:
            self.tracee.deferred.append(sig)
            return 0
        raise CkptError(f'task {self.tracee.tid} stopped with status {status:#x} in a remote call',
                        task=self.tracee.tid, resource='ptrace')

    def _write(self, at: int, data: bytes) -> None:
        self._mem.write(at, data)

    def _read(self, at: int, length: int) -> bytes:
        return self._mem.read(at, length)

    def __exit__(self, *_: object) -> None:
        if not self.tracee.attached or self.is_lost:
            return
        self.tracee.regs = self.regs
        self.tracee.sigmask = self.mask
        # Running elsewhere made the kernel clear rseq_cs (kernel/rseq.c, clear_rseq_cs). Without it the task would
        # continue in the middle of a sequence that it must start again.
        if self._rseq_cs:
            self._mem.write(self._rseq_at, struct.pack('<Q', self._rseq_cs))
