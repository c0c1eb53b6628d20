# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pipes: their size, their content, and reading it without consuming it (pipe(7), tee(2))."""

import array
import fcntl
import os
import select
import termios
from collections.abc import Iterator
from typing import Final

from ckptd.kernel.decl import c_int, c_size_t, c_ssize_t, c_uint, libc

SPLICE_F_NONBLOCK: Final = 2


@libc
def tee(fd_in: c_int, fd_out: c_int, len: c_size_t, flags: c_uint) -> c_ssize_t: ...


def bytes_in(fd: int) -> int:
    """Return the number of unread bytes of a pipe."""
    count = array.array('i', [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


def capacity(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def peek(fd: int) -> Iterator[bytes]:
    """Yield the content of a pipe by its read end, without consuming it or waking a reader: one packet at a time for a
    packet-mode pipe, else the kernel's buffers.

    OSError EPERM if the pipe is larger than the caller may make one (/proc/sys/fs/pipe-max-size).
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # tee(2) copies references to buffers, so the copy needs as many slots as the original
        if capacity(write_end) < (size := capacity(fd)):
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, size)
        try:
            left = tee(fd, write_end, size, SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return
        while left > 0:
            # a buffer that is a packet (PIPE_BUF_FLAG_PACKET) ends the read, whatever the copy's own mode
            chunk = os.read(read_end, left)
            left -= len(chunk)
            yield chunk
    finally:
        os.close(read_end)
        os.close(write_end)


def other_end_open(fd: int) -> bool:
    """Whether the other end is open: for a read end a writer, for a write end a reader."""
    poll = select.poll()
    poll.register(fd, 0)
    # POLLHUP: no writer left; POLLERR: no reader left. Both are reported even if not requested (poll(2)).
    return not any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
