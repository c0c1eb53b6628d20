# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first stub: a child of ours that runs a program of one page and then only what it is told to.

It makes the roots of the tree. Whatever tasks inherit from their maker for ever (no_new_privs, seccomp filters, mount
namespace, capability bounds) they inherit from this process, so a restart is never at work inside a sandbox.
"""

import os
import signal
import time
import warnings
from collections.abc import Iterable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE

from ckptd.errors import CkptError, NotSupported
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.creds import SUID_DUMP_USER, capget, capset
from ckptd.kernel.memory import PAGE, Mem
from ckptd.kernel.mman import MAP_FIXED_NOREPLACE
from ckptd.kernel.prctl import PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_SET_DUMPABLE, prctl
from ckptd.kernel.ptrace import PTRACE_EVENT_EXEC, Patience, Tracee, endless
from ckptd.remote.batch import Batch
from ckptd.remote.stub import BLOCK_ALL, OPTIONS, Arena, Stub

_PROGRAM_AT = 0x200000
ARENA_LENGTH = 64 * PAGE
_LOWEST = 1 << 32           # above what programs without PIE and their heaps use
_DISTANCE = 4 << 20         # from anything: a mapping that grows down keeps 256 pages of guard gap, mm/mmap.c
_ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE


def find_arena(taken: Iterable[tuple[int, int]]) -> Arena:
    """A place that no address space of the image uses. taken: [start, end) of all mappings."""
    start = _LOWEST
    for low, high in sorted(taken):
        if low >= start + ARENA_LENGTH + _DISTANCE:
            break
        start = max(start, high + _DISTANCE)
    if start + ARENA_LENGTH > arch.TASK_SIZE - _DISTANCE:
        raise NotSupported('the address spaces of the image leave no room for a stub', resource='memory')
    return Arena.at(start, ARENA_LENGTH)


def start_bootstrap(arena: Arena, service_fds: int, patience: Patience = endless) -> Stub:
    """Start the first stub. Its address space has the arena and nothing else, its files are those from number `bank`
    on; it is a child of ours. patience: of waits for it, and for all that it makes."""
    program = _program()
    try:
        tracee = _start(program, patience)
    finally:
        os.close(program)
    tracee.sigmask = BLOCK_ALL
    # until it has an arena, its own page holds the code, and the top of its stack the table
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
        if number not in (signal.SIGKILL, signal.SIGSTOP):      # what we ignore would be ignored by it, execve(2)
            batch.call('rt_sigaction', number, default, 0, 8)
    bootstrap.do(batch)
    return bootstrap


def _program() -> int:
    """An fd of the program, not open for writing, which execve(2) would refuse (ETXTBSY)."""
    writable = os.memfd_create('ckptd-stub', os.MFD_CLOEXEC)
    try:
        os.write(writable, arch.stub_program(_PROGRAM_AT))
        return os.open(f'/proc/self/fd/{writable}', os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def _keep_rights() -> None:
    """In the child of a worker that is an ordinary user: let it be traced, and keep its capability over execve(2).

    It has the memory of the worker, which is not dumpable. Other processes of the user still may not trace it, as they
    lack the capability (security/commoncap.c, cap_ptrace_access_check).
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
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads, for locks that they may hold; the child takes none
        warnings.simplefilter('ignore', DeprecationWarning)
        pid = os.fork()
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
    os.read(ready, 1)       # or its end: then it is gone
    os.close(ready)
    try:
        tracee = Tracee.seize(pid, OPTIONS, patience)
    finally:
        os.close(go)        # it goes on, traced or not
    try:
        status = tracee.wait(time.monotonic() + 10)
    except ProcessLookupError as error:
        raise CkptError('the stub cannot be started', hint='see limits on memory and processes') from error
    if status >> 16 != PTRACE_EVENT_EXEC:
        raise CkptError(f'the stub stopped with status {status:#x}')
    return tracee
