# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix sockets whose both ends are in the tree: unread data with its borders, files in flight, options, credentials."""

import fcntl
import os
import socket
import struct
from pathlib import Path

from victim import not_the_one_to_report, ready, wait_for_go

UNIX, SOL = socket.AF_UNIX, socket.SOL_SOCKET
PEEK_OFF, BUF_LOCK, PASSPIDFD = 42, 72, 76
UCRED = struct.Struct('=3I')


def pair(kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(UNIX, kind)


def take(sock: socket.socket, size: int = 1 << 20) -> tuple[bytes, list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, size, 10, socket.MSG_DONTWAIT)
    return data, fds


def nothing_left(sock: socket.socket) -> None:
    try:
        more = sock.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    raise AssertionError(f'more than was sent: {more!r}')


def peer_of(sock: socket.socket) -> tuple[int, ...]:
    return UCRED.unpack(sock.getsockopt(SOL, socket.SO_PEERCRED, UCRED.size))


class Sockets:
    """All that is prepared before the checkpoint and checked after it."""

    def __init__(self) -> None:
        self.stream, self.datagrams, self.packets = pair(), pair(socket.SOCK_DGRAM), pair(socket.SOCK_SEQPACKET)
        self.stream[1].sendall(b'one')
        self.stream[1].sendall(b'two' * 30_000)
        for message in (b'x', b'', b'abc'):
            self.datagrams[1].send(message)
        for message in (b'', b'packet', b'p' * 5000):
            self.packets[0].send(message)
        self.urgent = pair()
        self.urgent[0].sendall(b'before')
        self.urgent[0].send(b'!', socket.MSG_OOB)
        self.urgent[0].sendall(b'after')
        self.head = pair()
        self.head[0].send(b'?', socket.MSG_OOB)
        self._put_in_flight()
        self._half_close()
        self._set_options()
        self.peers = [peer_of(end) for end in (*self.stream, *self.datagrams, *self.packets)]

    def _put_in_flight(self) -> None:
        self.file = open('in-flight', 'wb+')  # noqa: PTH123, SIM115
        self.file.write(b'in flight')
        self.file.flush()
        self.carrier = pair()
        self.carrier[1].sendall(b'plain')
        socket.send_fds(self.carrier[1], [b'files'], [self.file.fileno(), self.file.fileno()])
        # a pipe that nobody has but the queue, with a byte in it
        read, write = os.pipe()
        os.write(write, b'p')
        socket.send_fds(self.carrier[1], [b'pipe'], [read, write])
        os.close(read)
        os.close(write)
        # A waits in the queue of B, which waits in the queue of A, and nobody has the ends that were sent through
        self.outer, inner = pair(), pair()
        socket.send_fds(inner[1], [b'the outer end'], [self.outer[0].fileno()])
        inner[0].setsockopt(SOL, socket.SO_PASSCRED, 1)
        socket.send_fds(self.outer[1], [b'the inner end'], [inner[0].fileno()])
        inner[0].close()
        inner[1].close()
        # likewise a memfd and a pidfd
        self.nameless, self.pid = pair(), os.getpid()
        memfd, pidfd = os.memfd_create('in flight'), os.pidfd_open(self.pid)
        os.write(memfd, b'memory')
        socket.send_fds(self.nameless[1], [b'm'], [memfd, pidfd])
        os.close(memfd)
        os.close(pidfd)

    def _half_close(self) -> None:
        self.half, self.shut, self.gone = pair(), pair(), pair()
        self.half[0].sendall(b'last')
        self.half[0].shutdown(socket.SHUT_WR)
        self.shut[1].shutdown(socket.SHUT_RD)
        self.gone[1].sendall(b'bye')
        socket.send_fds(self.gone[1], [b'!'], [self.file.fileno()])
        self.gone[1].close()

    def _set_options(self) -> None:
        self.fresh = socket.socket(UNIX, socket.SOCK_DGRAM)
        self.fresh.setsockopt(SOL, socket.SO_RCVTIMEO, struct.pack('qq', 3, 500_000))
        self.options = pair()
        self.options[0].setsockopt(SOL, socket.SO_SNDBUF, 40_000)
        self.options[0].setsockopt(SOL, socket.SO_PASSCRED, 1)
        self.options[0].setblocking(False)
        self.options[1].setsockopt(SOL, PEEK_OFF, 2)
        self.options[1].setsockopt(SOL, socket.SO_PRIORITY, 3)
        self.options[0].sendall(b'12345')
        self.options[1].sendall(b'from me')
        self.expected = self._read_options()

    def _read_options(self) -> list[int]:
        return [end.getsockopt(SOL, name) for end in self.options
                for name in (socket.SO_SNDBUF, socket.SO_RCVBUF, BUF_LOCK, socket.SO_PASSCRED, PEEK_OFF,
                             socket.SO_PRIORITY)]

    def check(self) -> None:
        assert [peer_of(end) for end in (*self.stream, *self.datagrams, *self.packets)] == self.peers
        assert self.stream[0].recv(1 << 20) == b'one' + b'two' * 30_000
        nothing_left(self.stream[0])
        assert [self.datagrams[0].recv(100) for _ in range(3)] == [b'x', b'', b'abc']
        nothing_left(self.datagrams[0])
        assert [self.packets[1].recv(9000) for _ in range(3)] == [b'', b'packet', b'p' * 5000]
        self.packets[0].send(b'again')
        assert self.packets[1].recv(100) == b'again'
        self._check_urgent()
        self._check_flight()
        assert self.half[1].recv(100) == b'last'
        assert self.half[1].recv(100) == b''
        self.half[1].sendall(b'the other way')
        assert self.half[0].recv(100) == b'the other way'
        try:
            self.shut[0].send(b'x')
            raise AssertionError('the other end has shut down')
        except BrokenPipeError:
            pass
        assert take(self.gone[0], 3) == (b'bye', [])
        data, fds = take(self.gone[0])
        assert data == b'!'
        assert os.path.sameopenfile(fds[0], self.file.fileno())
        assert self.gone[0].recv(1) == b''
        assert self.fresh.getsockopt(SOL, socket.SO_RCVTIMEO, 16) == struct.pack('qq', 3, 500_000)
        self._check_options()

    def _check_urgent(self) -> None:
        assert self.urgent[1].recv(100) == b'before'
        assert self.urgent[1].recv(1, socket.MSG_OOB) == b'!'
        assert self.urgent[1].recv(100) == b'after'
        assert self.head[1].recv(1, socket.MSG_OOB) == b'?'

    def _check_flight(self) -> None:
        assert take(self.carrier[0], 5) == (b'plain', [])
        data, fds = take(self.carrier[0])
        assert data == b'files'
        assert all(os.path.sameopenfile(fd, self.file.fileno()) for fd in fds)
        assert len(fds) == 2
        os.lseek(fds[0], 3, os.SEEK_SET)
        assert os.lseek(self.file.fileno(), 0, os.SEEK_CUR) == 3      # the same description
        data, [read, write] = take(self.carrier[0])
        assert data == b'pipe'
        os.write(write, b'q')
        assert os.read(read, 10) == b'pq'
        data, [inner] = take(self.outer[0])
        assert data == b'the inner end'
        with socket.socket(fileno=inner) as end:
            assert end.getsockopt(SOL, socket.SO_PASSCRED)
            data, control, _, _ = end.recvmsg(100, 1000)
            assert data == b'the outer end'
            [rights] = [value for _, kind, value in control if kind == socket.SCM_RIGHTS]
        [outer] = struct.unpack('i', rights)
        assert os.path.sameopenfile(outer, self.outer[0].fileno())
        data, [memfd, pidfd] = take(self.nameless[0])
        assert (os.pread(memfd, 10, 0), os.lseek(memfd, 0, os.SEEK_CUR)) == (b'memory', 6)
        assert f'\nPid:\t{self.pid}\n' in Path(f'/proc/self/fdinfo/{pidfd}').read_text()

    def _check_options(self) -> None:
        assert self._read_options() == self.expected
        assert fcntl.fcntl(self.options[0], fcntl.F_GETFL) & os.O_NONBLOCK
        assert self.options[1].recv(2, socket.MSG_PEEK) == b'34'
        assert self.options[1].recv(100) == b'12345'
        data, control, _, _ = self.options[0].recvmsg(100, 1000)
        assert data == b'from me'
        assert control == [(SOL, socket.SCM_CREDENTIALS, UCRED.pack(os.getpid(), os.getuid(), os.getgid()))]


def main() -> None:
    sockets = Sockets()
    ours, theirs = pair()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            not_the_one_to_report()
            ours.close()
            assert theirs.recv(100) == b'go'
            # the pair was made by its parent
            assert peer_of(theirs)[0] == os.getppid()
            theirs.sendall(b'done')
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    ready()
    wait_for_go()
    sockets.check()
    ours.sendall(b'go')
    assert ours.recv(100) == b'done'
    assert os.waitpid(child, 0) == (child, 0)


main()
