# SPDX-License-Identifier: LGPL-2.1-or-later
"""seccomp(2) from outside: the filters of a tracee, and how to keep them from seeing its calls.

Only a tracer with CAP_SYS_ADMIN in the initial user namespace that is under no seccomp itself may do either.
"""

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from ckptd.kernel.decl import cstruct, u64
from ckptd.kernel.fork import quiet_fork
from ckptd.kernel.ptrace import PTRACE_O_SUSPEND_SECCOMP, Tracee, ptrace

# <linux/ptrace.h>
PTRACE_SECCOMP_GET_FILTER = 0x420C
PTRACE_SECCOMP_GET_METADATA = 0x420D

# <linux/seccomp.h>
SECCOMP_SET_MODE_STRICT = 0
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_MODE_STRICT = 1
SECCOMP_MODE_FILTER = 2
SECCOMP_FILTER_FLAG_TSYNC = 1 << 0
SECCOMP_FILTER_FLAG_LOG = 1 << 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1 << 2
SECCOMP_FILTER_FLAG_TSYNC_ESRCH = 1 << 4
SECCOMP_RET_ACTION_FULL = 0xFFFF0000
SECCOMP_RET_USER_NOTIF = 0x7FC00000

BPF_MAXINSNS = 4096         # <linux/bpf_common.h>
_INSTRUCTION = struct.Struct('=HBBI')       # struct sock_filter
_RET_K = 0x06               # BPF_RET | BPF_K


@cstruct(size=16)
class seccomp_metadata(ctypes.Structure):
    """<linux/ptrace.h>, since 4.16"""
    filter_off: u64
    flags: u64


class Filter(NamedTuple):
    """A filter. program: instructions, each a struct sock_filter. flags: SECCOMP_FILTER_FLAG_LOG or 0, as the kernel
    tells no other."""
    program: bytes
    flags: int

    @property
    def notifies(self) -> bool:
        """Whether it hands calls to a listener (seccomp_unotify(2)), by an action that is a constant."""
        return any(code == _RET_K and k & SECCOMP_RET_ACTION_FULL == SECCOMP_RET_USER_NOTIF
                   for code, _, _, k in _INSTRUCTION.iter_unpack(self.program))


def read_filters(tid: int) -> tuple[Filter, ...]:
    """Return the filters of a stopped tracee, the oldest first; none for a task without filters or in strict mode.

    PermissionError without the right; EMEDIUMTYPE for a filter that the kernel does not keep as it was.
    """
    return tuple(_read_filters(tid))


def _read_filters(tid: int) -> Iterator[Filter]:
    number = 0
    while True:
        try:
            # index 0 is the oldest filter (kernel/seccomp.c, get_nth_filter), whatever ptrace(2) says
            length = ptrace(PTRACE_SECCOMP_GET_FILTER, tid, number, None)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):     # no filter at all, or no further one
                return
            raise
        program = ctypes.create_string_buffer(length * _INSTRUCTION.size)
        ptrace(PTRACE_SECCOMP_GET_FILTER, tid, number, program)
        metadata = seccomp_metadata(number, 0)
        ptrace(PTRACE_SECCOMP_GET_METADATA, tid, ctypes.sizeof(metadata), ctypes.byref(metadata))
        yield Filter(program.raw, metadata.flags)
        number += 1


def may_suspend() -> bool:
    """Whether we may keep filters of a tracee from seeing its calls, and read them. The kernel is asked once in each
    process, because a worker of a user has other rights than the process that it was forked from."""
    return _may_suspend(os.getpid())


@cache
def _may_suspend(_: int) -> bool:
    pid = quiet_fork()
    if pid == 0:
        while True:
            signal.pause()
    try:
        Tracee.seize(pid, PTRACE_O_SUSPEND_SECCOMP)
    except OSError:
        return False
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return True
