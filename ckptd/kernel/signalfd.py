# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGCHLD as an fd (signalfd(2)), to wait for children, tracees and other fds in one poll(2)."""

import ctypes
import errno
import os
import select
import signal
from types import TracebackType
from typing import Self

from ckptd.kernel.decl import c_int, c_void_p, libc

SFD_NONBLOCK, SFD_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC     # <sys/signalfd.h>
SIGSET_SIZE = 128                                           # sizeof(sigset_t) of libc
SIGINFO_SIZE = 128                                          # sizeof(struct signalfd_siginfo)
_LATE = 0.25                # seconds after which to check in any case


@libc
def signalfd(fd: c_int, mask: c_void_p, flags: c_int) -> c_int: ...


class ChildSignals:
    """A context, `with ChildSignals() as children`: SIGCHLD is blocked in this thread and read from `children.fd`.

    Pending signals of the same number are merged, so a wait only tells that something happened.
    """

    def __init__(self) -> None:
        self.fd = -1
        self._mask: set[signal.Signals] = set()

    def __enter__(self) -> Self:
        wanted = ctypes.create_string_buffer((1 << signal.SIGCHLD - 1).to_bytes(8, 'little'), SIGSET_SIZE)
        self.fd = signalfd(-1, wanted, SFD_NONBLOCK | SFD_CLOEXEC)
        self._mask = {signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
                      if number == signal.SIGCHLD}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        os.close(self.fd)
        self.fd = -1
        if signal.SIGCHLD not in self._mask:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def wait(self, timeout: float, also: int | None = None) -> None:
        """Wait until a child or tracee changes state, the fd `also` becomes readable, or `timeout` seconds have passed.

        It may return early: another thread in which SIGCHLD is not blocked may have received the signal.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if also is not None:
            poll.register(also, select.POLLIN)
        poll.poll(min(max(0.0, timeout), _LATE) * 1000)
        try:
            os.read(self.fd, 16 * SIGINFO_SIZE)
        except BlockingIOError as error:
            if error.errno != errno.EAGAIN:
                raise
