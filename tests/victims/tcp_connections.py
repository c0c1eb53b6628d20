# SPDX-License-Identifier: LGPL-2.1-or-later
"""TCP connections within a tree: unread bytes in both directions, urgent ones, half closed, closed, not accepted."""

import array
import fcntl
import os
import socket
import termios

from victim import not_the_one_to_report, ready, wait_for_go

V4, V6, TCP, SOL = socket.AF_INET, socket.AF_INET6, socket.IPPROTO_TCP, socket.SOL_SOCKET
BULK = os.urandom(30_000)
Pair = tuple[socket.socket, socket.socket]


def state(sock: socket.socket) -> int:
    while (found := sock.getsockopt(TCP, socket.TCP_INFO, 1)[0]) == 4:     # fin-wait-1, until the peer says something
        pass
    return found


def delivered(*socks: socket.socket) -> None:
    """Wait until the peers have all that was sent."""
    left = array.array('i', [1])
    for sock in socks:
        left[0] = 1
        while left[0]:
            fcntl.ioctl(sock, termios.TIOCOUTQ, left)


def nothing_left(sock: socket.socket) -> None:
    try:
        more = sock.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    raise AssertionError(f'more than was sent: {more!r}')


class Connections:

    def __init__(self) -> None:
        self.server = socket.create_server(('127.0.0.1', 0))
        self.server6 = socket.create_server(('::', 0), family=V6, dualstack_ipv6=True)
        self.plain, self.six, self.mixed = self.pair(), self.pair('::1'), self.pair('127.0.0.1', self.server6)
        self.bound = socket.socket()
        self.bound.bind(('127.0.0.1', 0))
        self.bound.connect(self.server.getsockname())
        self.of_bound = self.server.accept()[0]
        self.plain[0].sendall(BULK)
        self.plain[1].sendall(b'the other way')
        self.six[0].sendall(b'six')
        self.mixed[1].sendall(b'mixed')
        self._urge()
        self._close()
        self._set_options()
        self.with_child = self.pair()
        self.waiting = [socket.create_connection(self.server.getsockname()) for _ in range(3)]
        delivered(*(one for pair in (self.plain, self.six, self.mixed) for one in pair))
        self.before = self._look()

    def pair(self, host: str = '127.0.0.1', server: socket.socket | None = None) -> Pair:
        server = server or (self.server6 if ':' in host else self.server)
        client = socket.create_connection((host, server.getsockname()[1]))
        return client, server.accept()[0]

    def _urge(self) -> None:
        self.urgent, self.inline = self.pair(), self.pair()
        self.inline[1].setsockopt(SOL, socket.SO_OOBINLINE, 1)
        for one in (self.urgent, self.inline):
            one[0].sendall(b'before')
            one[0].send(b'!', socket.MSG_OOB)
            one[0].sendall(b'after')
            delivered(one[0])

    def _close(self) -> None:
        self.half, self.gone, self.done, self.deaf = self.pair(), self.pair(), self.pair(), self.pair()
        self.half[0].sendall(b'last')
        self.half[0].shutdown(socket.SHUT_WR)
        self.gone[0].sendall(b'bye')
        self.gone[0].close()
        self.done[0].sendall(b'farewell')
        self.done[0].shutdown(socket.SHUT_WR)
        while state(self.done[1]) != 8:         # close-wait
            pass
        self.done[1].shutdown(socket.SHUT_WR)
        self.deaf[1].shutdown(socket.SHUT_RD)
        # closed; fin-wait-2 and close-wait
        while [state(one) for one in (self.done[1], *self.half, self.gone[1])] != [7, 5, 8, 8]:
            pass

    def _set_options(self) -> None:
        self.options = self.pair()
        self.options[0].setsockopt(TCP, socket.TCP_NODELAY, 1)
        self.options[0].setsockopt(SOL, socket.SO_KEEPALIVE, 1)
        self.options[0].setsockopt(TCP, socket.TCP_KEEPIDLE, 99)
        self.options[1].setsockopt(TCP, socket.TCP_CORK, 1)
        self.options[1].setsockopt(TCP, socket.TCP_USER_TIMEOUT, 5000)
        self.options[1].setsockopt(SOL, socket.SO_RCVBUF, 50_000)
        self.options[1].setblocking(False)

    def _ends(self) -> list[socket.socket]:
        return [*self.plain, *self.six, *self.mixed, self.bound, self.of_bound, *self.urgent, *self.inline, *self.half,
                self.gone[1], *self.deaf, *self.options, *self.waiting]

    def _look(self) -> list[object]:
        found: list[object] = [(one.getsockname(), one.getpeername(), state(one), one.family) for one in self._ends()]
        found += [state(one) for one in self.done]
        found += [one.getsockopt(level, name) for one in self.options for level, name in (
            (TCP, socket.TCP_NODELAY), (TCP, socket.TCP_CORK), (TCP, socket.TCP_KEEPIDLE),
            (TCP, socket.TCP_USER_TIMEOUT), (SOL, socket.SO_KEEPALIVE), (SOL, socket.SO_RCVBUF),
            (SOL, socket.SO_REUSEADDR))]
        return found

    def check(self) -> None:
        now = self._look()
        assert now == self.before, [pair for pair in zip(now, self.before, strict=True) if pair[0] != pair[1]]
        assert self.plain[1].recv(len(BULK), socket.MSG_WAITALL) == BULK
        assert self.plain[0].recv(100) == b'the other way'
        assert self.six[1].recv(100) == b'six'
        assert self.mixed[0].recv(100) == b'mixed'
        assert [self.urgent[1].recv(100), self.urgent[1].recv(1, socket.MSG_OOB), self.urgent[1].recv(100)] == [
            b'before', b'!', b'after']
        assert [self.inline[1].recv(100), self.inline[1].recv(100)] == [b'before', b'!after']
        for one in (*self.plain, *self.six, *self.mixed, *self.urgent, *self.inline):
            nothing_left(one)
        self._check_closed()
        for one, other in (self.plain, self.six, self.mixed, (self.bound, self.of_bound)):
            one.sendall(b'ping')
            assert other.recv(10) == b'ping'
            other.sendall(b'pong')
            assert one.recv(10) == b'pong'
        accepted = [self.server.accept() for _ in range(3)]
        assert [name for _, name in accepted] == [one.getsockname() for one in self.waiting]
        for (server, _), client in zip(accepted, self.waiting, strict=True):
            client.sendall(b'at last')
            assert server.recv(10) == b'at last'
        for server in (self.server, self.server6):
            socket.create_connection(('127.0.0.1', server.getsockname()[1])).close()
            server.accept()[0].close()

    def _check_closed(self) -> None:
        assert [self.half[1].recv(10), self.half[1].recv(10)] == [b'last', b'']
        self.half[1].sendall(b'reply')
        assert self.half[0].recv(10) == b'reply'
        assert [self.gone[1].recv(10), self.gone[1].recv(10)] == [b'bye', b'']
        assert [self.done[1].recv(10), self.done[1].recv(10)] == [b'farewell', b'']
        assert self.done[0].recv(10) == b''
        assert self.deaf[1].recv(10, socket.MSG_DONTWAIT) == b''


def main() -> None:
    connections = Connections()
    ours, theirs = connections.with_child
    child = os.fork()
    if child == 0:
        status = 1
        try:
            not_the_one_to_report()
            ours.close()
            assert theirs.recv(100) == b'go'
            theirs.sendall(b'done')
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    ready()
    wait_for_go()
    connections.check()
    ours.sendall(b'go')
    assert ours.recv(100) == b'done'
    assert os.waitpid(child, 0) == (child, 0)


main()
