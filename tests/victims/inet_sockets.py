# SPDX-License-Identifier: LGPL-2.1-or-later
"""Internet sockets without a TCP connection: listeners, groups of them, datagram sockets, multicast groups."""

import fcntl
import os
import socket
import struct

from victim import ready, wait_for_go

V4, V6, STREAM, DGRAM, SOL = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOL_SOCKET
MPTCP, UDPLITE = 262, 136
LOOPBACK = {V4: '127.0.0.1', V6: '::1'}


def listener(family: int = V4, protocol: int = 0, address: tuple[str, int] | None = None,
             **options: int) -> socket.socket:
    made = socket.socket(family, STREAM, protocol)
    for name, value in options.items():
        made.setsockopt(SOL if name.startswith('SO_') else socket.IPPROTO_TCP, getattr(socket, name), value)
    made.bind(address or (LOOPBACK[family], 0))
    made.listen(7)
    return made


def bound(family: int = V4, kind: int = DGRAM, protocol: int = 0) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    made.bind((LOOPBACK[family], 0))
    return made


def backlog(sock: socket.socket) -> int:
    return struct.unpack_from('=I', sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32), 28)[0]


class Sockets:

    def __init__(self) -> None:
        self.fresh = socket.socket(V6, STREAM)
        self.unlistening = bound(V4, STREAM)
        self.listeners = [
            listener(), listener(V6), listener(V6, address=('::', 0)), listener(V4, MPTCP), listener(V6, MPTCP),
            listener(SO_REUSEADDR=1), listener(TCP_DEFER_ACCEPT=7), listener(TCP_FASTOPEN=5)]
        first = listener(SO_REUSEPORT=1)
        self.listeners += [first, listener(SO_REUSEPORT=1, address=first.getsockname())]
        self._make_datagrams()
        self._join()
        self.before = self._look()

    def _make_datagrams(self) -> None:
        self.a, self.b, self.dual = bound(), bound(), socket.socket(V6, DGRAM)
        self.dual.bind(('::', 0))
        self.lite = bound(V4, DGRAM, UDPLITE)
        self.connected = bound()
        self.connected.connect(self.a.getsockname())
        self.b.setblocking(False)
        for data in (b'first', b'', b'x' * 20_000):
            self.a.sendto(data, self.b.getsockname())
        self.connected.send(b'from the connected one')
        self.a.sendto(b'in the other family', ('127.0.0.1', self.dual.getsockname()[1]))
        self.connected.send(b'second')

    def _join(self) -> None:
        self.member = socket.socket(V4, DGRAM)
        self.member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                               socket.inet_aton('239.11.22.33') + socket.inet_aton('127.0.0.1'))
        self.member6 = socket.socket(V6, DGRAM)
        self.member6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(V6, 'ff02::1:77')
                                + struct.pack('=I', socket.if_nametoindex('lo')))

    def _everything(self) -> list[socket.socket]:
        return [self.fresh, self.unlistening, *self.listeners, self.a, self.b, self.dual, self.lite, self.connected,
                self.member, self.member6]

    def _look(self) -> list[object]:
        found: list[object] = [(one.getsockname(), one.family, one.type, one.proto) for one in self._everything()]
        found += [backlog(one) for one in self.listeners if one.proto != MPTCP]
        found += [one.getsockopt(SOL, name) for one in self._everything()
                  for name in (socket.SO_REUSEADDR, socket.SO_REUSEPORT, socket.SO_ACCEPTCONN)]
        found.append(self.connected.getpeername())
        self._require_membership()
        return found

    def _require_membership(self) -> None:
        # a group can be left only once
        again = struct.pack('=4s4s', socket.inet_aton('239.11.22.33'), socket.inet_aton('127.0.0.1'))
        try:
            self.member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, again)
        except OSError:     # EADDRINUSE: it has
            return
        raise AssertionError('the group was lost')

    def check(self) -> None:
        assert self._look() == self.before
        for data in (b'first', b'', b'x' * 20_000):
            assert self.b.recvfrom(30_000) == (data, self.a.getsockname())
        for data in (b'from the connected one', b'second'):
            assert self.a.recvfrom(100, socket.MSG_DONTWAIT) == (data, self.connected.getsockname())
        data, sender = self.dual.recvfrom(100, socket.MSG_DONTWAIT)
        assert (data, sender[:2]) == (b'in the other family', ('::ffff:127.0.0.1', self.a.getsockname()[1]))
        assert fcntl.fcntl(self.b, fcntl.F_GETFL) & os.O_NONBLOCK
        self.lite.sendto(b'lite', self.lite.getsockname())
        assert self.lite.recv(100) == b'lite'
        for one in self.listeners[:6]:
            self._use(one)

    def _use(self, one: socket.socket) -> None:
        host = '127.0.0.1' if one.family == V4 else '::1'
        with socket.create_connection((host, one.getsockname()[1]), timeout=10) as client:
            server, _ = one.accept()
            with server:
                client.sendall(b'hello')
                assert server.recv(10) == b'hello'


def main() -> None:
    sockets = Sockets()
    ready()
    wait_for_go()
    sockets.check()


main()
