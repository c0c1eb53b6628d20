# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check that this processor supports the register state of an image: the components of XSAVE, and their layout."""

import os
import signal
import struct
import time
from functools import cache
from typing import NoReturn

from ckptd.kernel.creds import SUID_DUMP_USER
from ckptd.kernel.fork import quiet_fork
from ckptd.kernel.prctl import PR_SET_DUMPABLE, prctl
from ckptd.kernel.ptrace import Tracee

_XCR0_AT, _XSTATE_BV_AT = 464, 512      # <asm/user.h>: sw_usable_bytes; Intel SDM 1, 13.4.2: XSTATE_BV
_NAMES = {0: 'x87', 1: 'SSE', 2: 'AVX', 5: 'AVX-512', 6: 'AVX-512', 7: 'AVX-512', 9: 'protection keys', 17: 'AMX',
          18: 'AMX', 19: 'APX'}


@cache
def own_xstate() -> bytes:
    """Return the state of a process of ours, as PTRACE_GETREGSET returns it for any."""
    life, end = os.pipe2(os.O_CLOEXEC)
    ready, told = os.pipe2(os.O_CLOEXEC)
    pid = quiet_fork()
    if pid == 0:
        os.close(end)
        _wait(life, told)
    os.close(life)
    os.close(told)
    try:
        os.read(ready, 1)
        with Tracee.seize(pid) as tracee:
            tracee.stop(time.monotonic() + 10)
            return tracee.xstate()
    finally:
        os.close(ready)
        os.close(end)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait(life: int, told: int) -> NoReturn:
    """Wait, in the child, until the parent closes the other end of `life` or dies. A child that had stopped itself
    would stay stopped if the parent died."""
    try:
        prctl(PR_SET_DUMPABLE, SUID_DUMP_USER)      # otherwise a worker that is an ordinary user could not trace it
        os.write(told, b'r')
        os.read(life, 1)
    finally:
        os._exit(0)


def shortcoming(xstate: bytes, own: bytes) -> str:
    """Name the part of this state that the processor does not support; '' if it supports all."""
    if len(xstate) < _XSTATE_BV_AT + 8 or len(own) < _XSTATE_BV_AT + 8:
        return '' if len(xstate) == len(own) else 'the register state has another size'
    theirs, ours = (struct.unpack_from('<Q', area, _XCR0_AT)[0] for area in (xstate, own))
    missing = theirs & ~ours
    if missing:
        names = sorted({_NAMES.get(bit, f'component {bit}') for bit in range(64) if missing >> bit & 1})
        return f'uses {", ".join(names)}, which this processor does not have'
    if theirs != ours or len(xstate) != len(own):
        return 'has its registers laid out as another processor does'
    return ''
