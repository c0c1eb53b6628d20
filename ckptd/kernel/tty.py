# SPDX-License-Identifier: LGPL-2.1-or-later
"""Terminals (ioctl_tty(2), pty(7)): their settings, and the two ends of a pseudo-terminal."""

import errno
import fcntl
import os
import select
import struct
import termios
from typing import NamedTuple

from ckptd.kernel.decl import IO, IOR, IOW

TERMIOS_SIZE, LOCKED_SIZE = 44, 36      # struct termios2 and struct termios of <asm/termbits.h>
TCGETS2, TCSETS2 = IOR('T', 0x2A, TERMIOS_SIZE), IOW('T', 0x2B, TERMIOS_SIZE)
TIOCGPTN, TIOCSPTLCK, TIOCGDEV = IOR('T', 0x30, 4), IOW('T', 0x31, 4), IOR('T', 0x32, 4)
TIOCGPKT, TIOCGPTLCK, TIOCGEXCL = IOR('T', 0x38, 4), IOR('T', 0x39, 4), IOR('T', 0x40, 4)
TIOCGPTPEER = IO('T', 0x41)
TIOCGSID = 0x5429
TIOCGLCKTRMIOS, TIOCSLCKTRMIOS = 0x5456, 0x5457


class Winsize(NamedTuple):
    """struct winsize."""
    rows: int
    columns: int
    x_pixels: int
    y_pixels: int


_WINSIZE = struct.Struct('=4H')
_FLAGS = struct.Struct('=4I')       # c_iflag, c_oflag, c_cflag, c_lflag
_CC_AT = _FLAGS.size + 1            # c_cc, behind c_line


class Modes(NamedTuple):
    """The members of struct termios2 that decide what becomes of a character. cc: special characters."""
    iflag: int
    oflag: int
    cflag: int
    lflag: int
    cc: bytes

    @classmethod
    def of(cls, settings: bytes) -> 'Modes':
        iflag, oflag, cflag, lflag = _FLAGS.unpack_from(settings)
        return cls(iflag, oflag, cflag, lflag, settings[_CC_AT:_CC_AT + 19])

    def put_into(self, settings: bytes) -> bytes:
        """Return struct termios2 with these members, and the other ones of `settings`."""
        return _FLAGS.pack(*self[:4]) + settings[_FLAGS.size:_CC_AT] + self.cc + settings[_CC_AT + 19:]


def read_settings(fd: int) -> bytes:
    """Return struct termios2 of a terminal. A master answers for its slave."""
    return fcntl.ioctl(fd, TCGETS2, bytes(TERMIOS_SIZE))


def set_settings(fd: int, settings: bytes) -> None:
    """Set struct termios2 at once. A master sets that of its slave."""
    fcntl.ioctl(fd, TCSETS2, settings)


def read_locks(fd: int) -> bytes:
    """Return struct termios whose bits are set where the settings of the terminal may not be changed."""
    return fcntl.ioctl(fd, TIOCGLCKTRMIOS, bytes(LOCKED_SIZE))


def set_locks(fd: int, locks: bytes) -> None:
    """Set what may not be changed. PermissionError without CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE."""
    fcntl.ioctl(fd, TIOCSLCKTRMIOS, locks)


def read_size(fd: int) -> Winsize:
    return Winsize(*_WINSIZE.unpack(fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(_WINSIZE.size))))


def set_size(fd: int, size: Winsize) -> None:
    """Set the size. The foreground process group gets SIGWINCH if it differs."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, _WINSIZE.pack(*size))


def line_discipline(fd: int) -> int:
    """Return N_*, of this end."""
    return _number(fd, termios.TIOCGETD)


def device_of(fd: int) -> int:
    """Return the device number of the terminal, which /dev/tty stands for. A master has that of its slave."""
    found = _number(fd, TIOCGDEV)
    return os.makedev(found >> 8 & 0xFFF, found & 0xFF | found >> 12 & 0xFFF00)


def is_exclusive(fd: int) -> bool:
    """Whether only CAP_SYS_ADMIN may open this end again."""
    return bool(_number(fd, TIOCGEXCL))


def set_exclusive(fd: int) -> None:
    fcntl.ioctl(fd, termios.TIOCEXCL)


def is_hung_up(fd: int) -> bool:
    """Whether it is the slave of a pseudo-terminal whose master is closed, or was hung up by vhangup(2)."""
    try:
        read_settings(fd)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return True
    return False


def polls(fd: int, event: int) -> bool:
    """Whether poll(2) reports the event now. For POLLIN the kernel first finishes what is on its way between the two
    ends (drivers/tty/n_tty.c, n_tty_poll)."""
    poll = select.poll()
    poll.register(fd, event)
    return any(events & event for _, events in poll.poll(0))


# ---------------------------------------------------------------- the master of a pseudo-terminal

def peer_number(master: int) -> int:
    """Return N of the slave /dev/pts/N."""
    return _number(master, TIOCGPTN)


def open_slave(master: int, flags: int) -> int:
    """Open the slave, wherever its file system is mounted (since 4.13). It does not become the controlling terminal.
    OSError with EIO while it is locked.

    O_CLOEXEC in `flags` stays a flag of the file (drivers/tty/pty.c, ptm_open_peer). The fd is close-on-exec anyway.
    """
    fd = fcntl.ioctl(master, TIOCGPTPEER, flags | os.O_NOCTTY)
    os.set_inheritable(fd, False)
    return fd


def is_locked(master: int) -> bool:
    """Whether the slave cannot be opened yet (unlockpt(3))."""
    return bool(_number(master, TIOCGPTLCK))


def set_locked(master: int, locked: bool) -> None:
    fcntl.ioctl(master, TIOCSPTLCK, struct.pack('=i', locked))


def in_packet_mode(master: int) -> bool:
    return bool(_number(master, TIOCGPKT))


def set_packet_mode(master: int) -> None:
    """Begin packet mode. This forgets what has happened to the slave until now."""
    fcntl.ioctl(master, termios.TIOCPKT, struct.pack('=i', 1))


def end_packet_mode(master: int) -> None:
    fcntl.ioctl(master, termios.TIOCPKT, struct.pack('=i', 0))


def session_of(master: int) -> int:
    """Return the leader of the session whose controlling terminal the slave is; 0 without one."""
    try:
        return _number(master, TIOCGSID)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        return 0


def foreground_of(master: int) -> int:
    """Return the foreground process group of the slave; 0 without one."""
    return _number(master, termios.TIOCGPGRP)


def _number(fd: int, request: int) -> int:
    [found] = struct.unpack('=I', fcntl.ioctl(fd, request, bytes(4)))
    return int(found)
