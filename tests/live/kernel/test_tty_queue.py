# SPDX-License-Identifier: LGPL-2.1-or-later
"""Data that waits in a pseudo-terminal is taken out and put back: nothing of it is lost, and no setting changes."""

import fcntl
import os
import pty
import select
import struct
import termios
import tty as modes
from collections.abc import Iterator

import pytest

from ckptd.kernel import tty
from ckptd.kernel.tty_queue import TIOCPKT_DOSTOP, TIOCPKT_FLUSHWRITE, TIOCPKT_START, Waiting, put_back, take_out

Pair = tuple[int, int]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = pty.openpty()
    yield made
    for fd in made:
        os.close(fd)


def there_and_back(pair: Pair) -> Waiting:
    """What waits, which waits again afterwards."""
    master, slave = pair
    settings = tty.read_settings(slave)
    waiting = take_out(master)
    assert not take_out(master)
    put_back(master, waiting)
    assert take_out(master) == waiting
    assert tty.read_settings(slave) == settings
    put_back(master, waiting)
    return waiting


def typed(pair: Pair, data: bytes, echo: bytes) -> None:
    """Typed characters have arrived when their echo has."""
    os.write(pair[0], data)
    said = b''
    while said != echo:
        said += os.read(pair[0], len(echo) - len(said))


def test_nothing(pair: Pair) -> None:
    assert not there_and_back(pair)


@pytest.mark.parametrize('end', ['\n', '\x04', '|'])
def test_lines(pair: Pair, end: str) -> None:
    settings = termios.tcgetattr(pair[1])
    settings[6][termios.VEOL] = b'|'
    termios.tcsetattr(pair[1], termios.TCSANOW, settings)
    shown = {'\n': '\r\n', '\x04': ''}.get(end, end)
    erased = '\b \b' * len('half ')
    typed(pair, f'one{end}{end}half \x15a rest'.encode(), f'one{shown}{shown}half {erased}a rest'.encode())
    os.write(pair[1], b'output\n')
    first = 'one' if end == '\x04' else f'one{end}'
    second = '' if end == '\x04' else end
    assert there_and_back(pair) == Waiting(b'output\r\n', (first.encode(), second.encode(), b'a rest'), 0)
    assert os.read(pair[1], 100) == first.encode()


def test_every_byte(pair: Pair) -> None:
    modes.setraw(pair[1])
    every = bytes(range(256))
    os.write(pair[0], every * 3)
    for _ in range(40):
        os.write(pair[1], every)
    waiting = there_and_back(pair)
    assert (waiting.output, b''.join(waiting.lines)) == (every * 40, every * 3)


def test_all_that_fits(pair: Pair) -> None:
    modes.setraw(pair[1])
    os.set_blocking(pair[1], False)
    written = 0
    while tty.polls(pair[1], select.POLLOUT):
        written += os.write(pair[1], b'x' * 4096)
    assert len(there_and_back(pair).output) == written > 8192


def test_events_of_packet_mode(pair: Pair) -> None:
    master, slave = pair
    tty.set_packet_mode(master)
    settings = termios.tcgetattr(slave)
    termios.tcsetattr(slave, termios.TCSANOW, [settings[0] & ~termios.IXON, *settings[1:]])
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    termios.tcflush(slave, termios.TCOFLUSH)
    termios.tcflow(slave, termios.TCOOFF)
    termios.tcflow(slave, termios.TCOON)
    os.write(slave, b'data')
    events = TIOCPKT_DOSTOP | TIOCPKT_FLUSHWRITE | TIOCPKT_START
    assert there_and_back(pair) == Waiting(b'data', (b'',), events)
    assert os.read(master, 10) == bytes([events])
    assert os.read(master, 10) == b'\0data'


def test_stopped_output(pair: Pair) -> None:
    master, slave = pair
    modes.setraw(slave)
    settings = termios.tcgetattr(slave)
    termios.tcsetattr(slave, termios.TCSANOW, [settings[0] | termios.IXON, *settings[1:]])
    os.write(master, b'\x13typed')
    while struct.unpack('i', fcntl.ioctl(slave, termios.FIONREAD, bytes(4)))[0] < 5:
        os.sched_yield()
    assert there_and_back(pair) == Waiting(b'', (b'typed',), 0, stopped=True)
    os.write(master, b'\x11')
    os.write(slave, b'again')
    assert os.read(master, 10) == b'again'
