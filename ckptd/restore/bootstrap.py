# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first stub: a child of ours that runs a program of one page and then only executes our calls.

It makes the roots of the tree. Tasks inherit some properties from their maker for ever (no_new_privs, seccomp filters,
mount namespace, capability bounds). They inherit them from this process, so a restart never runs inside a sandbox.
"""

import os
import signal
import time
from collections.abc import Iterable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE

from ckptd.errors import CkptError, NotSupported
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.creds import SUID_DUMP_USER, capget, capset
from ckptd.kernel.fork import quiet_fork
from ckptd.kernel.memfd import make_memfd
from ckptd.kernel.memory import PAGE, Mem
from ckptd.kernel.mman import MAP_FIXED_NOREPLACE
from ckptd.kernel.prctl import PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_SET_DUMPABLE, prctl
from ckptd.kernel.ptrace import PTRACE_EVENT_EXEC, PTRACE_O_SUSPEND_SECCOMP, Patience, Tracee, endless
from ckptd.remote.batch import Batch
from ckptd.remote.stub import BLOCK_ALL, OPTIONS, Arena, Stub

_PROGRAM_AT = 0x200000
ARENA_LENGTH = 64 * PAGE
_LOWEST = 1 << 32           # above the addresses of programs without PIE and their heaps
_DISTANCE = 4 << 20         # from any mapping: one that grows down keeps 256 pages of guard gap (mm/mmap.c)
_ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE


def find_arena(taken: Iterable[tuple[int, int]]) -> Arena:
    """Find a place that no address space of the image uses. taken: [start, end) of all mappings."""
    start = _LOWEST
    for low, high in sorted(taken):
        if low >= start + ARENA_LENGTH + _DISTANCE:
            break
        start = max(start, high + _DISTANCE)
    if start + ARENA_LENGTH > arch.TASK_SIZE - _DISTANCE:
        raise NotSupported('the address spaces of the image leave no room for a stub', resource='memory')
    return Arena.at(start, ARENA_LENGTH)


def start_bootstrap(arena: Arena, service_fds: int, patience: Patience = endless) -> Stub:
    """Start the first stub, a child of ours. Its address space has only the arena, and its files are those from number
    `service_fds` on. patience: for waits for it and for all that it makes."""
    program = _program()
    try:
        tracee = _start(program, patience)
    finally:
        os.close(program)
    tracee.sigmask = BLOCK_ALL
    # until it has an arena, its own page contains the code, and the top of its stack the table
    boot = Arena(_PROGRAM_AT, PAGE, _PROGRAM_AT, (tracee.regs.rsp & -PAGE) - PAGE, PAGE)
    first = Stub(tracee, boot)
    with Mem(tracee.tid) as mem:
        mem.write(boot.code, arch.STUB)
        batch = Batch()
        batch.call('mmap', arena.start, PAGE, PROT_READ | PROT_EXEC, _ANONYMOUS, -1, 0)
        batch.call('mmap', arena.table, arena.length - PAGE, PROT_READ | PROT_WRITE, _ANONYMOUS, -1, 0)
        first.do(batch)
        mem.write(arena.code, arch.STUB)
    bootstrap = Stub(tracee, arena)
    batch = Batch()
    batch.call('munmap', 0, arena.start)
    batch.call('munmap', arena.end, arch.TASK_SIZE - arena.end)
    batch.call('close_range', 0, service_fds - 1, 0)
    default = batch.buffer(32)
    for number in range(1, 65):
        # a signal that we ignore would be ignored by it, too (execve(2))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            batch.call('rt_sigaction', number, default, 0, 8)
    bootstrap.do(batch)
    return bootstrap


def _program() -> int:
    """Return an fd of the program that is not open for writing, which execve(2) would reject (ETXTBSY)."""
    writable = make_memfd('ckptd-stub', 0o700, 0)
    try:
        os.write(writable, arch.stub_program(_PROGRAM_AT))
        return os.open(f'/proc/self/fd/{writable}', os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def _seize(pid: int, patience: Patience) -> Tracee:
    """Trace the stub. All that it makes inherit the options. They may be given seccomp filters before their last call
    for us."""
    try:
        return Tracee.seize(pid, OPTIONS | PTRACE_O_SUSPEND_SECCOMP, patience)
    except PermissionError:     # without CAP_SYS_ADMIN; then the plan has refused any filters
        return Tracee.seize(pid, OPTIONS, patience)


def _keep_rights() -> None:
    """Allow tracing and keep the capability over execve(2), in the child of a worker that is an ordinary user.

    The child has the memory of the worker, which is not dumpable. Other processes of the user still may not trace it,
    because they lack the capability (security/commoncap.c, cap_ptrace_access_check).
    """
    prctl(PR_SET_DUMPABLE, SUID_DUMP_USER)
    held = capget()
    if held.permitted:
        capset(held._replace(inheritable=held.permitted))
        for capability in range(held.permitted.bit_length()):
            if held.permitted >> capability & 1:
                prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def _start(program: int, patience: Patience) -> Tracee:
    wait, go = os.pipe2(os.O_CLOEXEC)
    ready, told = os.pipe2(os.O_CLOEXEC)
    pid = quiet_fork()
    if pid == 0:
        try:
            os.close(go)
            if os.geteuid() != 0:
                _keep_rights()
            os.write(told, b'r')
            os.read(wait, 1)
            os.execve(program, ['ckptd-stub'], {})
        finally:
            os._exit(127)
    os.close(wait)
    os.close(told)
    os.read(ready, 1)       # or end-of-file: then it is gone
    os.close(ready)
    try:
        tracee = _seize(pid, patience)
    finally:
        os.close(go)        # it continues, traced or not
    try:
        status = tracee.wait(time.monotonic() + 10)
    except ProcessLookupError as error:
        raise CkptError('cannot start the stub', hint='check the limits on memory and processes') from error
    if status >> 16 != PTRACE_EVENT_EXEC:
        raise CkptError(f'the stub stopped with status {status:#x}')
    return tracee
