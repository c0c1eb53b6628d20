# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stopped process exits with status 0, as if its program had ended."""

from ckptd.errors import NotSupported
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.maps import read_maps
from ckptd.kernel.memory import Mem
from ckptd.kernel.ptrace import Tracee
from ckptd.remote.borrow import find_room

_ALL = 2**64 - 1


def begin_exit(tracee: Tracee) -> bool:
    """Continue a stopped task so that its process exits. All threads of the process end. Signals that it blocks then,
    among them a SIGTERM that is pending, have no effect. Return False if the task runs no 64-bit code, or has no room
    for ours; then nothing was changed. OSError."""
    regs = tracee.regs
    if regs.cs != arch.CS_64:
        return False
    mem = Mem(tracee.tid)
    try:
        at = find_room(mem, read_maps(tracee.tid))
        mem.write(at, arch.exit_code())
    except NotSupported:
        return False
    finally:
        mem.close()
    # no system call was interrupted that the kernel would issue again (arch/x86/kernel/signal.c)
    regs.rip, regs.orig_rax = at, _ALL
    tracee.regs = regs
    tracee.sigmask = _ALL
    tracee.cont()
    return True
