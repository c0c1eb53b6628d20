# SPDX-License-Identifier: LGPL-2.1-or-later
"""POSIX message queues of our IPC namespace (mq_overview(7)). Names have no leading slash, as the kernel wants them."""

import ctypes
import os
import re
from typing import NamedTuple

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_long, c_uint, c_void_p, cstruct, s64, syscall

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD = 0, 1, 2        # <asm-generic/siginfo.h>
SIGEVENT_SIZE = 64

_STATE = re.compile(rb'QSIZE:(\d+) +NOTIFY:(\d+) +SIGNO:(\d+) +NOTIFY_PID:(\d+)')


@cstruct(size=64)
class mq_attr(ctypes.Structure):
    """<linux/mqueue.h>"""
    mq_flags: s64
    mq_maxmsg: s64
    mq_msgsize: s64
    mq_curmsgs: s64
    reserved0: s64
    reserved1: s64
    reserved2: s64
    reserved3: s64


@syscall(NR['mq_open'])
def _mq_open(name: c_void_p, flags: c_int, mode: c_uint, attributes: c_void_p) -> c_long: ...


@syscall(NR['mq_unlink'])
def _mq_unlink(name: c_void_p) -> c_long: ...


@syscall(NR['mq_getsetattr'])
def _mq_getsetattr(fd: c_int, new: c_void_p, old: c_void_p) -> c_long: ...


class QueueState(NamedTuple):
    """The answer of read(2) of a queue (ipc/mqueue.c, mqueue_read_file)."""
    size: int       # bytes of all messages
    notify: int     # SIGEV_*
    signal: int     # 0 if the notification is no signal
    pid: int        # of the process that asked for a notification, as its reader sees it; 0 for none


def mq_open(name: str, flags: int) -> int:
    """Open an existing queue. OSError.

    O_CLOEXEC in `flags` stays a flag of the file (ipc/mqueue.c, do_mq_open). The fd is close-on-exec anyway.
    """
    fd = _mq_open(os.fsencode(name), flags, 0, None)
    os.set_inheritable(fd, False)
    return fd


def mq_create(name: str, maxmsg: int, msgsize: int) -> int:
    """Make a queue (mode 0600) and open it for reading and writing. FileExistsError, OSError."""
    attributes = mq_attr(0, maxmsg, msgsize)
    return _mq_open(os.fsencode(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600,
                    ctypes.byref(attributes))


def mq_unlink(name: str) -> None:
    _mq_unlink(os.fsencode(name))


def mq_getattr(fd: int) -> mq_attr:
    attributes = mq_attr()
    _mq_getsetattr(fd, None, ctypes.byref(attributes))
    return attributes


def sigevent(notify: int, signal: int) -> bytes:
    """Pack a struct sigevent without a value (sigevent(3type))."""
    return (bytes(8) + signal.to_bytes(4, 'little') + notify.to_bytes(4, 'little')).ljust(SIGEVENT_SIZE, b'\0')


def parse_state(data: bytes) -> QueueState:
    """Parse 'QSIZE:129        NOTIFY:2     SIGNO:0     NOTIFY_PID:8260'."""
    found = _STATE.match(data)
    if found is None:
        raise ValueError(f'no state of a message queue: {data!r}')
    return QueueState(*map(int, found.groups()))
