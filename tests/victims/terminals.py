# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pseudo-terminals whose masters are in the tree: settings, size, names, sessions, packet mode, what is hung up. With
the argument "unread": data that waits in them."""

import fcntl
import os
import select
import signal
import struct
import sys
import termios
import traceback

from victim import not_the_one_to_report, ready, wait_for_go

TIOCGPTN, TIOCSPTLCK, TIOCGPTLCK = 0x80045430, 0x40045431, 0x80045439
TIOCGPKT, TIOCGEXCL, TIOCGSID, TIOCGPTPEER = 0x80045438, 0x80045440, 0x5429, 0x5441
TIOCPKT_FLUSHWRITE = 2
_held: list[int] = []


def open_high() -> None:
    """Let os.openpty() return numbers from here on that other programs get only when hundreds of terminals are open."""
    first = 64 + os.getpid() % 32 * 16
    while not _held or number(_held[-1], TIOCGPTN) < first:
        _held.append(os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY))


def close_low() -> None:
    while _held:
        os.close(_held.pop())


def number(fd: int, request: int) -> int:
    return struct.unpack('i', fcntl.ioctl(fd, request, bytes(4)))[0]


def size_of(fd: int) -> tuple[int, ...]:
    return struct.unpack('4H', fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))


def polls(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLPRI)
    return next((events for _, events in poll.poll(0)), 0)


def fails(call: object, *arguments: object) -> int:
    try:
        call(*arguments)    # type: ignore[operator]
    except OSError as error:
        return error.errno or -1
    return 0


class Pair:
    """A pseudo-terminal with unusual settings."""

    def __init__(self, rows: int) -> None:
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack('4H', rows, 77, 640, 480))
        settings = termios.tcgetattr(self.slave)
        settings[0] |= termios.IXOFF
        settings[3] &= ~(termios.ECHO | termios.ICANON)
        settings[4] = settings[5] = termios.B19200
        settings[6][termios.VINTR] = b'\x07'
        settings[6][termios.VMIN] = 3
        termios.tcsetattr(self.slave, termios.TCSANOW, settings)
        self.noted = self.look()

    def look(self) -> list[object]:
        of = os.fstat(self.slave)
        return [termios.tcgetattr(self.slave), size_of(self.slave), os.ttyname(self.slave),
                number(self.master, TIOCGPTN), number(self.master, TIOCGPTLCK), number(self.master, TIOCGPKT),
                number(self.slave, TIOCGEXCL), of.st_mode, of.st_uid, of.st_gid, polls(self.master), polls(self.slave)]

    def check(self) -> None:
        assert self.look() == self.noted, f'{self.look()} is not {self.noted}'
        os.write(self.slave, b'one\n')
        prefix = b'\0' if number(self.master, TIOCGPKT) else b''
        assert os.read(self.master, 100) == prefix + b'one\r\n'
        os.write(self.master, b'key')
        assert os.read(self.slave, 100) == b'key'

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


class Odd:
    """Ends that are alone."""

    def __init__(self) -> None:
        self.fresh = os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)      # nobody has opened its slave, which is locked
        self.left, slave = os.openpty()
        os.close(slave)
        master, self.hung = os.openpty()
        os.fchmod(self.hung, 0o604)
        os.close(master)
        # O_CLOEXEC is a flag of this file, and FD_CLOEXEC one of the first fd only
        self.master = os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)
        fcntl.ioctl(self.master, termios.TIOCEXCL)
        fcntl.ioctl(self.master, TIOCSPTLCK, struct.pack('i', 0))
        self.closing = fcntl.ioctl(self.master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        self.staying = os.dup(self.closing)
        os.set_inheritable(self.staying, True)

    def check(self) -> None:
        assert number(self.fresh, TIOCGPTLCK) == 1
        assert polls(self.fresh) == 0
        assert polls(self.left) & select.POLLHUP
        assert fails(os.read, self.left, 1) == 5
        assert os.read(self.hung, 1) == b''
        assert os.fstat(self.hung).st_mode & 0o7777 == 0o604
        assert number(self.master, TIOCGEXCL) == 1
        assert fcntl.fcntl(self.closing, fcntl.F_GETFL) & os.O_CLOEXEC
        assert [os.get_inheritable(fd) for fd in (self.closing, self.staying)] == [False, True]
        assert fails(os.write, self.hung, b'x') == 5
        fcntl.ioctl(self.fresh, TIOCSPTLCK, struct.pack('i', 0))
        slave = fcntl.ioctl(self.fresh, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
        os.write(slave, b'first')
        assert os.read(self.fresh, 10) == b'first'
        # the one that was left can be opened again
        again = fcntl.ioctl(self.left, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
        assert not polls(self.left)
        os.close(again)


class Unread:
    """Data that waits at both ends."""

    def __init__(self) -> None:
        self.lines, self.raw, self.packets, self.closed, self.stopped = pairs = [os.openpty() for _ in range(5)]
        # the fourth character of a terminal's settings ends a line without being part of it
        write_and_await(self.lines, b'first\nwithout its end\x04\x04half ox\x7ff a line')
        os.write(self.lines[1], b'out\n')
        for pair in pairs[1:]:
            settings = termios.tcgetattr(pair[1])
            settings[0] &= ~termios.ICRNL
            settings[1] &= ~termios.OPOST
            settings[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
            settings[6][termios.VMIN] = 200
            termios.tcsetattr(pair[1], termios.TCSANOW, settings)
        os.write(self.raw[0], bytes(range(0x20, 0x100)) * 2)
        for _ in range(20):
            os.write(self.raw[1], bytes(range(256)))
        fcntl.ioctl(self.packets[0], termios.TIOCPKT, struct.pack('i', 1))
        termios.tcflush(self.packets[1], termios.TCOFLUSH)
        os.write(self.packets[1], b'in packets')
        os.write(self.closed[1], b'last words')
        os.close(self.closed[1])
        os.write(self.stopped[0], b'\x13')
        while ready_to_write(self.stopped[1]):
            os.sched_yield()
        self.settings = [termios.tcgetattr(slave) for _, slave in pairs if slave != self.closed[1]]

    def check(self) -> None:
        pairs = (self.lines, self.raw, self.packets, self.stopped)
        assert [termios.tcgetattr(slave) for _, slave in pairs] == self.settings
        master, slave = self.lines
        # what was echoed is part of the output
        assert os.read(master, 1000) == b'first\r\nwithout its endhalf ox\x08 \x08f a lineout\r\n'
        assert [os.read(slave, 100) for _ in range(3)] == [b'first\n', b'without its end', b'']
        assert not polls(slave)
        os.write(master, b'\n')
        assert os.read(slave, 100) == b'half of a line\n'
        master, slave = self.raw
        assert take(slave, 448) == bytes(range(0x20, 0x100)) * 2
        assert take(master, 5120) == bytes(range(256)) * 20
        master, slave = self.packets
        assert os.read(master, 100) == bytes([TIOCPKT_FLUSHWRITE])
        assert os.read(master, 100) == b'\0in packets'
        assert not polls(master)
        assert os.read(self.closed[0], 100) == b'last words'
        assert fails(os.read, self.closed[0], 1) == 5
        master, slave = self.stopped
        assert not ready_to_write(slave)
        os.write(master, b'\x11')
        while not ready_to_write(slave):
            os.sched_yield()


def write_and_await(pair: tuple[int, int], data: bytes) -> None:
    """Write to a terminal with lines and wait until its end has come: a kernel thread passes it on."""
    os.write(pair[0], data)
    while number(pair[0], termios.FIONREAD) < len(b'first\r\nwithout its endhalf ox\x08 \x08f a line'):
        os.sched_yield()


def ready_to_write(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def take(fd: int, size: int) -> bytes:
    data = b''
    while len(data) < size:
        data += os.read(fd, size - len(data))
    return data


def program(slave: int, master: int, said: int, told: int) -> None:
    """The leader of a session on the slave, with a child in the background and one in the foreground."""
    os.close(master)
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    own = os.open('/dev/tty', os.O_RDWR)
    got = []
    signal.signal(signal.SIGWINCH, lambda *_: got.append('size'))
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    children = [child(work, slave) for work in (waits, waits, gives_up)]
    front = children[0][0]
    os.tcsetpgrp(slave, front)
    os.write(said, b'!')
    assert os.read(told, 1) == b'?'     # not from the terminal, where it is in the background
    assert got == [], got
    assert os.tcgetpgrp(slave) == os.tcgetpgrp(own) == front
    assert os.ttyname(slave) == os.ttyname(0) == os.ttyname(own).replace('/dev/tty', os.ttyname(0))
    for pid, go in children:
        os.write(go, b'?')
        assert os.waitpid(pid, 0) == (pid, 0)
    os.write(own, b'all right\n')


def child(work: object, slave: int) -> tuple[int, int]:
    """A child in a group of its own, and a pipe that tells it to check itself."""
    read, write = os.pipe()
    told, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            work(slave, write, told)      # type: ignore[operator]
            status = 0
        except (AssertionError, OSError):
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    assert os.read(read, 1) == b'!'
    os.close(read)
    return pid, go


def waits(slave: int, said: int, told: int) -> None:
    os.write(said, b'!')
    os.close(said)
    os.read(told, 1)
    assert number(slave, TIOCGSID) == os.getsid(0)
    os.close(os.open('/dev/tty', os.O_RDWR))


def gives_up(slave: int, said: int, told: int) -> None:
    fcntl.ioctl(slave, termios.TIOCNOTTY)
    os.write(said, b'!')
    os.close(said)
    os.read(told, 1)
    assert fails(os.open, '/dev/tty', os.O_RDWR) == 6


def unread() -> None:
    open_high()
    data = Unread()
    close_low()
    ready()
    wait_for_go()
    data.check()


def main() -> None:
    open_high()
    plain, packets, exclusive = Pair(33), Pair(34), Pair(35)
    os.fchmod(plain.slave, 0o622)
    fcntl.ioctl(packets.master, termios.TIOCPKT, struct.pack('i', 1))
    fcntl.ioctl(exclusive.slave, termios.TIOCEXCL)
    pairs = [plain, packets, exclusive]
    for pair in pairs:
        pair.noted = pair.look()
    odd = Odd()
    master, slave = os.openpty()
    close_low()
    read, write = os.pipe()
    told, tell = os.pipe()
    leader = os.fork()
    if leader == 0:
        status = 1
        try:
            not_the_one_to_report()
            for pair in pairs:
                pair.close()
            os.dup2(slave, 0)
            program(slave, master, write, told)
            status = 0
        except (AssertionError, OSError):
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(slave)
    os.close(write)
    assert os.read(read, 1) == b'!'
    os.close(read)
    assert number(master, TIOCGSID) == leader
    ready()
    wait_for_go()
    for pair in pairs:
        pair.check()
    odd.check()
    assert number(master, TIOCGSID) == leader
    os.write(tell, b'?')
    assert os.read(master, 100) == b'all right\r\n'
    assert os.waitpid(leader, 0) == (leader, 0)


unread() if sys.argv[1:] == ['unread'] else main()
