# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix sockets with names: listeners, accepted connections, named clients, datagrams, and clients not accepted yet."""

import os
import socket
import struct
from pathlib import Path

from victim import not_the_one_to_report, ready, wait_for_go

UNIX, SOL = socket.AF_UNIX, socket.SOL_SOCKET
UCRED = struct.Struct('=3I')
SEQPACKET, DGRAM = socket.SOCK_SEQPACKET, socket.SOCK_DGRAM
ABSTRACT = f'\0ckptd-names-{os.getpid()}'


def new(kind: int = socket.SOCK_STREAM, name: str | bytes = '') -> socket.socket:
    sock = socket.socket(UNIX, kind)
    if name:
        sock.bind(name)
    return sock


def listener(name: str, kind: int = socket.SOCK_STREAM, backlog: int = 5) -> socket.socket:
    sock = new(kind, name)
    sock.listen(backlog)
    return sock


def connected(name: str | bytes, kind: int = socket.SOCK_STREAM, own: str = '') -> socket.socket:
    sock = new(kind, own)
    sock.connect(name)
    return sock


def peer_of(sock: socket.socket) -> tuple[int, ...]:
    return UCRED.unpack(sock.getsockopt(SOL, socket.SO_PEERCRED, UCRED.size))


def facts(sock: socket.socket) -> list[object]:
    peer = ''
    if sock.type != DGRAM or sock in NAMED_PEERS:
        try:
            peer = sock.getpeername()
        except OSError as error:
            peer = error.errno
    return [sock.getsockname(), peer, peer_of(sock), sock.getsockopt(SOL, socket.SO_ACCEPTCONN)]


NAMED_PEERS: list[socket.socket] = []


class Sockets:

    def __init__(self) -> None:
        self.relative = listener('relative')
        self.path = listener(str(Path('path').absolute()), SEQPACKET)
        Path('path').chmod(0o640)
        self.abstract = listener(ABSTRACT)
        self.bound = new(name='bound')      # it listens later
        self.auto = new()
        self.auto.bind('')
        Path('below').mkdir()
        # only root learns where a relative name begins if no process works there any more
        name = 'other' if os.geteuid() == 0 else str(Path('below/other').absolute())
        os.chdir('below')
        self.below = listener(name)
        os.chdir('..')
        self._replace()
        self._connect()
        self._send_datagrams()
        self._wait()
        self.all = [one for one in vars(self).values() if isinstance(one, socket.socket)]
        self.before = [facts(one) for one in self.all]
        self.files = self._files()

    def _replace(self) -> None:
        """A deleted name, one that is a FIFO by now, and one that another socket has."""
        self.deleted = listener(str(Path('deleted').absolute()))
        self.to_deleted = connected('deleted')
        Path('deleted').unlink()
        self.replaced, self.first = listener(str(Path('replaced').absolute())), listener(str(Path('twice').absolute()))
        if os.geteuid() == 0:       # others need a free name
            Path('replaced').unlink()
            Path('twice').unlink()
            os.mkfifo('replaced')
            self.second = listener('twice')
        else:
            self.second = self.first

    def _connect(self) -> None:
        self.clients = [connected('relative'), connected('path', SEQPACKET), connected(ABSTRACT),
                        connected('relative', own='client'), connected(ABSTRACT, own=f'{ABSTRACT}-client')]
        servers = [self.relative, self.path, self.abstract, self.relative, self.abstract]
        self.accepted = [server.accept()[0] for server in servers]
        for number, (client, server) in enumerate(zip(self.clients, self.accepted, strict=True)):
            client.send(b'from client %d' % number)
            server.send(b'from server %d' % number)
            setattr(self, f'client{number}', client)
            setattr(self, f'server{number}', server)
        closing = listener('closing')
        self.left = connected('closing')
        self.orphan = closing.accept()[0]
        closing.close()         # its file stays
        gone = connected('relative')
        self.half = self.relative.accept()[0]
        gone.send(b'bye')
        gone.close()

    def _send_datagrams(self) -> None:
        self.log = new(DGRAM, 'log')
        self.other_log = new(DGRAM, f'{ABSTRACT}-log')
        self.logger, self.named_logger = connected('log', DGRAM), connected('log', DGRAM, 'sender')
        self.to_abstract = connected(f'{ABSTRACT}-log', DGRAM, f'{ABSTRACT}-sender')
        self.logger.send(b'anonymous')
        self.named_logger.send(b'named')
        with new(DGRAM, 'closed') as closed:
            closed.sendto(b'of a closed one', 'log')
        self.to_abstract.send(b'abstract')
        self.to_abstract.send(b'')
        self.one, self.other = new(DGRAM, 'one'), new(DGRAM, 'two')
        self.one.connect('two')
        self.other.connect('one')
        self.one.send(b'mutual')
        NAMED_PEERS.extend((self.logger, self.named_logger, self.to_abstract, self.one, self.other))

    def _wait(self) -> None:
        self.waiting = [connected('relative'), connected('relative', own='waiting')]
        self.waiting_abstract = connected(ABSTRACT)

    def _files(self) -> list[tuple[str, int, int, int]]:
        # for a moment after the start, stale files of sockets have names that begin with a dot
        return sorted((path.name, of.st_mode, of.st_uid, of.st_gid) for path in Path().iterdir()
                      if not path.is_file() and not path.name.startswith('.') for of in [path.lstat()])

    def check(self) -> None:
        for sock, before in zip(self.all, self.before, strict=True):
            assert facts(sock) == before, (facts(sock), before)
        assert self._files() == self.files, (self._files(), self.files)
        for number, (client, server) in enumerate(zip(self.clients, self.accepted, strict=True)):
            assert server.recv(100) == b'from client %d' % number
            assert client.recv(100) == b'from server %d' % number
            client.send(b'more')
            assert server.recv(100) == b'more'
        self.left.send(b'left')
        assert self.orphan.recv(100) == b'left'
        assert self.half.recv(100) == b'bye'
        assert self.half.recv(100) == b''
        self._check_datagrams()
        for name, server in (('relative', self.relative), (ABSTRACT, self.abstract), ('below/other', self.below),
                             ('twice', self.second)):
            with connected(name) as client, server.accept()[0] as accepted:
                client.send(b'new')
                assert accepted.recv(10) == b'new'
        self.bound.listen()
        connected('bound').close()
        self._check_backlog()

    def check_waiting(self, child: int) -> None:
        """Those that wait to be accepted: two of this process, and then one of the child."""
        for client in self.waiting:
            accepted, _ = self.relative.accept()
            assert accepted.getpeername() == client.getsockname()
            assert peer_of(accepted)[0] == os.getpid()
            client.send(b'at last')
            assert accepted.recv(100) == b'at last'
        with self.relative.accept()[0] as accepted:
            assert peer_of(accepted)[0] == child
            assert accepted.recv(10) == b'child'
        with self.abstract.accept()[0] as accepted:
            self.waiting_abstract.send(b'too')
            assert accepted.recv(100) == b'too'

    def _check_datagrams(self) -> None:
        assert self.log.recvfrom(100) == (b'anonymous', None)
        assert self.log.recvfrom(100) == (b'named', 'sender')
        assert self.log.recvfrom(100) == (b'of a closed one', 'closed')
        assert self.other_log.recvfrom(100) == (b'abstract', f'{ABSTRACT}-sender'.encode())
        assert self.other_log.recvfrom(100) == (b'', f'{ABSTRACT}-sender'.encode())
        assert self.other.recvfrom(100) == (b'mutual', 'one')
        self.other.send(b'back')
        assert self.one.recv(100) == b'back'
        self.named_logger.send(b'again')
        assert self.log.recvfrom(100) == (b'again', 'sender')
        with new(DGRAM) as stranger:
            try:
                stranger.connect('one')
                raise AssertionError('it is connected to another socket')
            except PermissionError:
                pass

    def _check_backlog(self) -> None:
        """The sixth connection is the last that fits."""
        clients = []
        for _ in range(6):
            clients.append(connected('below/other'))
        with new() as last:
            last.setblocking(False)
            try:
                last.connect('below/other')
                raise AssertionError('the backlog is longer')
            except BlockingIOError:
                pass


def main() -> None:
    sockets = Sockets()
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            not_the_one_to_report()
            here.close()
            with connected('relative') as client:       # the listener is its parent's
                assert peer_of(client)[0] == os.getppid()
                there.send(b'connected')
                assert there.recv(10) == b'go'
                assert peer_of(client)[0] == os.getppid()
                client.send(b'child')
            status = 0
        finally:
            os._exit(status)
    there.close()
    # behind those that wait: the child's connection is accepted with them
    assert here.recv(10) == b'connected'
    ready()
    wait_for_go()
    here.send(b'go')
    sockets.check_waiting(child)
    assert os.waitpid(child, 0) == (child, 0)
    sockets.check()


main()
