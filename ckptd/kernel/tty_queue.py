# SPDX-License-Identifier: LGPL-2.1-or-later
"""Data that waits between the two ends of a pseudo-terminal: take it out, and put it back (drivers/tty/n_tty.c).

The slave's line discipline changes bytes in both directions, so its settings are changed for the duration of the calls.
While they last, no other process may use the terminal.
"""

import errno
import os
import select
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ckptd.kernel.tty import (
    Modes,
    end_packet_mode,
    in_packet_mode,
    open_slave,
    polls,
    read_settings,
    set_packet_mode,
    set_settings,
)

_CHUNK = 4096
_SECONDS = 5.0          # until a kernel thread has passed on some KiB
_PAUSE = 0.001          # between two looks whether it has
_EOT, _XON, _XOFF = 4, 0x11, 0x13
_ERASING = (termios.VERASE, termios.VKILL, termios.VWERASE, termios.VLNEXT, termios.VREPRINT)
# <asm/ioctls.h>, ioctl_tty(2)
TIOCPKT_FLUSHREAD, TIOCPKT_FLUSHWRITE, TIOCPKT_STOP, TIOCPKT_START = 1, 2, 4, 8
TIOCPKT_NOSTOP, TIOCPKT_DOSTOP = 16, 32


class Waiting(NamedTuple):
    """Unread data. output: for the master. lines: for the slave; in canonical mode one for each read(2) and at last an
    incomplete one, else one with everything. events: TIOCPKT_*, for the master. stopped: Ctrl-S was pressed."""
    output: bytes
    lines: tuple[bytes, ...]
    events: int
    stopped: bool = False

    def __bool__(self) -> bool:
        return bool(self.output or len(self.lines) > 1 or any(self.lines) or self.events)


def take_out(master: int) -> Waiting:
    """Take everything out. The settings are as before, with the others for a moment."""
    output, events = _take_output(master)
    with _slave(master) as slave:
        return Waiting(output, _take_input(slave), events, is_stopped(slave))


def is_stopped(slave: int) -> bool:
    """Whether the output of a terminal is stopped, if none of it waits (tcflow(3), or Ctrl-S)."""
    return not polls(slave, select.POLLOUT)


@contextmanager
def _slave(master: int) -> Iterator[int]:
    fd = open_slave(master, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _with_settings(fd: int, settings: bytes) -> Iterator[None]:
    before = read_settings(fd)
    set_settings(fd, settings)
    try:
        yield
    finally:
        set_settings(fd, before)


def _take_output(master: int) -> tuple[bytes, int]:
    data, events, packets = bytearray(), 0, in_packet_mode(master)
    while polls(master, select.POLLIN | select.POLLPRI):
        chunk = os.read(master, _CHUNK)
        if packets:
            events |= chunk[0]
            chunk = chunk[1:]
        data += chunk
    return bytes(data), events


def _take_input(slave: int) -> tuple[bytes, ...]:
    lines = []
    settings = read_settings(slave)
    modes = Modes.of(settings)
    if modes.lflag & termios.ICANON:
        while polls(slave, select.POLLIN):
            lines.append(os.read(slave, _CHUNK))
    # without lines a read(2) gets what there is
    with _with_settings(slave, modes._replace(lflag=modes.lflag & ~termios.ICANON).put_into(settings)):
        return (*lines, _rest(slave))


def _rest(slave: int) -> bytes:
    data = bytearray()
    try:
        while chunk := os.read(slave, _CHUNK):
            data += chunk
    except BlockingIOError:
        pass
    return bytes(data)


# ---------------------------------------------------------------- put back

def put_back(master: int, waiting: Waiting) -> None:
    """Put data into the empty queues of a terminal that has its final settings, and packet mode if it has that. OSError
    if the kernel does not accept all of it."""
    settings, packets = read_settings(master), in_packet_mode(master)
    modes = Modes.of(settings)
    with _slave(master) as slave:
        if is_stopped(slave):
            termios.tcflow(slave, termios.TCOON)
            _control_flow(master, slave, settings, _XON)
        if packets:
            end_packet_mode(master)     # the echo would end the events
        with _with_settings(slave, _plain(settings)):
            _type(master, slave, waiting.lines)
        if packets:
            set_packet_mode(master)
            _cause(slave, settings, waiting)
        # IXON stays, whose change would be an event
        with _with_settings(slave, modes._replace(oflag=modes.oflag & ~termios.OPOST).put_into(settings)):
            _write(slave, waiting.output)
        if packets and waiting.events & (TIOCPKT_STOP | TIOCPKT_START):
            termios.tcflow(slave, termios.TCOOFF)
            if waiting.events & TIOCPKT_START:
                termios.tcflow(slave, termios.TCOON)
        if waiting.stopped and not is_stopped(slave):
            _control_flow(master, slave, settings, _XOFF)


def _plain(settings: bytes) -> bytes:
    """Return settings with which no byte changes or has an effect, but for the ends of lines; and each is echoed."""
    modes = Modes.of(settings)
    cc = bytearray(modes.cc)
    for index in _ERASING:
        cc[index] = 0       # disabled
    cc[termios.VEOF] = cc[termios.VEOF] or _EOT
    canonical = modes.lflag & termios.ICANON
    return Modes(0, 0, modes.cflag, canonical | termios.ECHO | termios.IEXTEN, bytes(cc)).put_into(settings)


def _type(master: int, slave: int, lines: Sequence[bytes]) -> None:
    """Write to the master what the slave is to read. A kernel thread passes it on, and the echo tells when it has done
    so."""
    modes = Modes.of(read_settings(slave))
    ends = {ord('\n'), modes.cc[termios.VEOL], modes.cc[termios.VEOL2]} - {0}
    last = len(lines) - 1
    for number, line in enumerate(lines):
        _write(master, line)
        _await_echo(master, len(line))
        if number < last and (not line or line[-1] not in ends):
            _write(master, bytes([modes.cc[termios.VEOF]]))      # not echoed
    if modes.lflag & termios.ICANON and last > 0:
        _await_lines(slave)


def _await_echo(master: int, count: int) -> None:
    deadline = time.monotonic() + _SECONDS
    poll = select.poll()
    poll.register(master, select.POLLIN)
    while count > 0:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError(errno.ETIMEDOUT, 'the terminal does not echo')
        count -= len(os.read(master, count))


def _await_lines(slave: int) -> None:
    """Wait until there is a line. The characters before its end were echoed."""
    poll = select.poll()
    poll.register(slave, select.POLLIN)
    if not poll.poll(_SECONDS * 1000):
        raise TimeoutError(errno.ETIMEDOUT, 'the terminal has no line')


def _write(fd: int, data: bytes) -> None:
    """Write all of the data. The buffers are full for a moment if the kernel thread that passes it on is late, and that
    thread wakes no writer."""
    deadline = time.monotonic() + _SECONDS
    while data:
        try:
            done = os.write(fd, data[:_CHUNK])
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)
        else:
            data = data[done:]


def _cause(slave: int, settings: bytes, waiting: Waiting) -> None:
    """Let the terminal have its events again. It is in packet mode, and has no output. TIOCPKT_IOCTL comes by itself,
    at each change of settings with EXTPROC."""
    modes, events = Modes.of(settings), waiting.events
    if events & (TIOCPKT_NOSTOP | TIOCPKT_DOSTOP):
        with _with_settings(slave, modes._replace(iflag=modes.iflag ^ termios.IXON).put_into(settings)):
            pass
    if events & TIOCPKT_FLUSHREAD and not any(waiting.lines):      # it would drop them
        termios.tcflush(slave, termios.TCIFLUSH)
    if events & TIOCPKT_FLUSHWRITE:
        termios.tcflush(slave, termios.TCOFLUSH)


def _control_flow(master: int, slave: int, settings: bytes, char: int) -> None:
    """Start or stop the output, as by a key."""
    modes = Modes.of(settings)
    cc = bytearray(modes.cc)
    cc[termios.VSTART], cc[termios.VSTOP] = _XON, _XOFF
    deadline = time.monotonic() + _SECONDS
    with _with_settings(slave, modes._replace(iflag=modes.iflag | termios.IXON, cc=bytes(cc)).put_into(settings)):
        os.write(master, bytes([char]))
        # a kernel thread passes the character on; no event tells of a stop
        while is_stopped(slave) != (char == _XOFF):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, 'the terminal neither stops nor starts')
            os.sched_yield()
