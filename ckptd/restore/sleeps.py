# SPDX-License-Identifier: LGPL-2.1-or-later
"""Continue sleeps with the time that was left.

The end of an interrupted nanosleep, poll or futex is only in the kernel's restart block of the task. So the new task
begins the same call, with the remaining time as its timeout, and is interrupted in it. It then has a restart block of
its own, and with its old registers (rax -516, ERESTART_RESTARTBLOCK) the kernel continues the sleep.
"""

import ctypes
import struct

from ckptd.image.reader import ImageReader
from ckptd.image.records import ENDLESS, Registers, SleepLeft
from ckptd.kernel.arch import x86_64 as arch
from ckptd.remote.batch import Batch
from ckptd.remote.interleave import Steps
from ckptd.remote.stub import Stub

# the argument that is the timeout: a pointer to a timespec or, for poll, milliseconds
_TIMEOUT = {arch.NR['nanosleep']: 0, arch.NR['clock_nanosleep']: 2, arch.NR['futex']: 3, arch.NR['poll']: 2}


def sleep_again(reader: ImageReader, vpid: int, stub: Stub) -> Steps[arch.user_regs_struct | None]:
    """Return the registers that replace the task's old ones, or None. It must be the last thing that the task does as a
    stub before leaving: another interrupted call would overwrite the restart block."""
    left, regs = reader.table(SleepLeft).get(vpid), _registers(reader, vpid)
    if left is None or ctypes.c_int64(regs.rax).value != -arch.ERESTART_RESTARTBLOCK:
        return None
    if left.left_ns == ENDLESS or left.number not in _TIMEOUT:
        regs.rax, regs.rip, regs.orig_rax = left.number, regs.rip - 2, (1 << 64) - 1
        return regs
    result = yield from stub.alone(_begin(stub, left, regs))
    if result == -arch.ERESTART_RESTARTBLOCK:
        return None
    regs.rax, regs.orig_rax = result & (1 << 64) - 1, (1 << 64) - 1
    return regs


def _registers(reader: ImageReader, vpid: int) -> arch.user_regs_struct:
    return arch.user_regs_struct.from_buffer_copy(reader.get(Registers, vpid).gpr)


def _begin(stub: Stub, left: SleepLeft, regs: arch.user_regs_struct) -> Steps[int]:
    """Begin the call and interrupt it. Return its result."""
    batch = Batch()
    arguments = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9]
    name = next(name for name, number in arch.NR.items() if number == left.number)
    position = _TIMEOUT[left.number]
    rest = batch.buffer(16, struct.pack('<qq', *divmod(left.left_ns, 10**9)))
    timeout = -(-left.left_ns // 10**6) if name == 'poll' else rest
    batch.call(name, *arguments[:position], timeout, *arguments[position + 1:])
    stub.write(batch, stub.arena.table)
    tracee = stub.tracee
    tracee.regs = arch.stub_registers(stub.arena.code, stub.arena.table)
    yield from stub.to_syscall()
    # It waits at the entry of the call. With this the call is interrupted at once, unless it need not wait.
    tracee.interrupt()
    yield from stub.to_syscall()
    result = ctypes.c_int64(tracee.regs.rax).value
    yield from stub.interrupt()     # again: the stop at the end of the call has used up the first one
    return result
