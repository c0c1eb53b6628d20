# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets and pipes that lead out of the tree, which the caller of a restart hands over (--external=WHAT:inherit)."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptd.errors import Finding, Refused
from tests.lib import settled
from tests.lib.victim import Victim
from tests.worker.driver import DirectWorker, Place

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

CLIENT = """
import fcntl, os, socket, sys
from victim import ready, wait_for_go
family, kind, name = getattr(socket, sys.argv[1]), getattr(socket, sys.argv[2]), sys.argv[3].replace('@', chr(0))
client = socket.socket(family, kind)
client.connect(name if family == socket.AF_UNIX else ('127.0.0.1', int(name)))
twin = os.dup(client.fileno())
client.setblocking(False)
client.send(b'first')
ready()
wait_for_go()
assert fcntl.fcntl(twin, fcntl.F_GETFL) & os.O_NONBLOCK
assert client.recv(100) == b'of the caller'
os.write(twin, b'second')
"""
UNIX = [('AF_UNIX', 'SOCK_STREAM'), ('AF_UNIX', 'SOCK_SEQPACKET'), ('AF_UNIX', 'SOCK_DGRAM')]


class Talk:
    """A client in the tree, and its server in this process. `what`: the name of the server in policies."""

    def __init__(self, tmp_path: Path, family: str, kind: str) -> None:
        self.place = Place(tmp_path).make()
        self.server = socket.socket(getattr(socket, family), getattr(socket, kind))
        if family == 'AF_UNIX':
            self.server.bind(f'\0ckptd-test-{os.getpid()}')
            name = self.what = f'@ckptd-test-{os.getpid()}'
        else:
            self.server.bind(('127.0.0.1', 0))
            name = str(self.server.getsockname()[1])
            self.what = f'{"udp" if kind == "SOCK_DGRAM" else "tcp"}:127.0.0.1:{name}'
        if kind != 'SOCK_DGRAM':
            self.server.listen()
        program = tmp_path / 'client.py'
        program.write_text(CLIENT)
        self.victim = Victim('client', family, kind, name, directory=tmp_path / 'victim', program=program)

    def accepted(self) -> socket.socket:
        """The server's end of a connection."""
        if self.server.type == socket.SOCK_DGRAM:
            return self.server.dup()
        return self.server.accept()[0]

    def another(self) -> socket.socket:
        """A new client."""
        sock = socket.socket(self.server.family, self.server.type)
        if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_DGRAM):
            sock.bind('')       # autobound: the server has to answer
        sock.connect(self.server.getsockname())
        return sock

    def killed(self) -> Path:
        image = self.place.checkpoint(self.victim.pid, forked=True, after='kill', external=[f'{self.what}:inherit'])
        self.victim.process.wait()
        settled.reap_orphans()
        return image

    def restored(self, image: Path, *given: tuple[str, socket.socket]) -> int:
        request = self.place.request(0, operation='restore', image=image.name, inherit=tuple(what for what, _ in given))
        with DirectWorker(forked=True) as worker:
            return int(worker.run(request, tuple(sock.fileno() for _, sock in given))['root'])

    def refused(self, image: Path, *given: tuple[str, socket.socket]) -> list[Finding]:
        with pytest.raises(Refused) as caught:
            self.restored(image, *given)
        return list(caught.value.refusals)


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Callable[[str, str], Talk]]:
    with ExitStack() as stack:
        def make(family: str, kind: str) -> Talk:
            made = Talk(tmp_path, family, kind)
            stack.enter_context(made.server)
            stack.enter_context(made.victim)
            return made
        yield make


@pytest.mark.parametrize(('family', 'kind'), [*UNIX, ('AF_INET', 'SOCK_STREAM'), ('AF_INET', 'SOCK_DGRAM')])
def test_a_socket_of_the_caller(talk: Callable[[str, str], Talk], family: str, kind: str) -> None:
    """It is that very socket, and nobody else has it afterwards."""
    one = talk(family, kind)
    with one.accepted() as before:
        image = one.killed()
        assert before.recv(100) == b'first'
    [missing] = one.refused(image)
    assert (missing.errno, one.what in missing.reason) == ('ENOTCONN', True)
    assert f'--inherit {one.what}=FD' in missing.hint
    with one.another() as mine:
        cookie = mine.getsockopt(socket.SOL_SOCKET, 57, 8)      # SO_COOKIE
        address = mine.getsockname()
        root = one.restored(image, (one.what, mine))
        [held] = {fd.stat().st_ino for fd in Path(f'/proc/{root}/fd').iterdir()} & {os.fstat(mine.fileno()).st_ino}
        assert held
        assert mine.getsockopt(socket.SOL_SOCKET, 57, 8) == cookie
        assert fcntl.fcntl(mine.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK      # of the description, so ours has it, too
    with one.accepted() as after:
        after.sendto(b'of the caller', address) if kind == 'SOCK_DGRAM' else after.send(b'of the caller')
        one.victim.go()
        assert os.waitpid(root, 0) == (root, 0), one.victim.output
        assert after.recv(100) == b'second'
        if kind != 'SOCK_DGRAM':
            assert after.recv(100) == b''


def test_a_socket_of_another_kind(talk: Callable[[str, str], Talk]) -> None:
    """Each is refused by name, and so is one that nothing takes."""
    one = talk('AF_UNIX', 'SOCK_STREAM')
    image = one.killed()
    with ExitStack() as stack:
        fresh, datagram = socket.socket(socket.AF_UNIX), socket.socketpair(type=socket.SOCK_DGRAM)
        inet, mine = socket.create_server(('127.0.0.1', 0)), one.another()
        tcp = socket.create_connection(inet.getsockname())
        pipe = os.pipe()
        for sock in (fresh, *datagram, inet, tcp, mine):
            stack.enter_context(sock)
        for sock, words in ((fresh, 'a socket without a connection'), (one.server, 'without a connection'),
                            (datagram[0], 'AF_UNIX SOCK_DGRAM'), (inet, 'without a connection'),
                            (tcp, '(AF_INET SOCK_STREAM, protocol 6)')):
            [row] = one.refused(image, (one.what, sock))
            assert row.errno == 'EPROTOTYPE'
            assert words in row.reason
            assert row.hint == 'give a connected socket (AF_UNIX SOCK_STREAM)'
        request = one.place.request(0, operation='restore', image=image.name, inherit=(one.what,))
        with DirectWorker(forked=True) as worker, pytest.raises(Refused, match='is a pipe open for reading'):
            worker.run(request, pipe[:1])
        for fd in pipe:
            os.close(fd)
        [row] = one.refused(image, (one.what, mine), ('/run/another', mine))
        assert (row.errno, row.resource, '/run/another' in row.reason) == ('EINVAL', 'inherit', True)


def test_a_pipe_of_the_caller(tmp_path: Path) -> None:
    """Both directions: what is in the pipe stays there; an end of another direction is refused."""
    place, program = Place(tmp_path).make(), tmp_path / 'program.py'
    program.write_text("""
import os, sys
from victim import ready, wait_for_go
source, sink = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY)
assert os.read(source, 3) == b'one'
ready()
wait_for_go()
assert os.read(source, 100) == b'two'
assert os.read(source, 100) == b''
os.write(sink, b'done')
""")
    (their_source, source), (sink, their_sink) = os.pipe(), os.pipe()
    names = [f'pipe:[{os.fstat(fd).st_ino}]' for fd in (source, sink)]
    os.write(source, b'onefour')
    ours = Path(f'/proc/{os.getpid()}/fd')
    with Victim('program', str(ours / str(their_source)), str(ours / str(their_sink)), directory=tmp_path / 'victim',
                program=program) as running:
        os.close(their_source)
        os.close(their_sink)
        image = place.checkpoint(running.pid, forked=True, after='kill', external=[f'{name}:inherit' for name in names])
        running.process.wait()
        settled.reap_orphans()
        assert os.read(sink, 1) == b''
        os.close(source)
        os.close(sink)
        (their_source, source), (sink, their_sink) = os.pipe(), os.pipe()
        os.write(source, b'two')
        os.close(source)
        request = place.request(0, operation='restore', image=image.name, inherit=tuple(names))
        with DirectWorker(forked=True) as worker, pytest.raises(Refused, match='is a pipe open for writing'):
            worker.run(request, (their_sink, their_source))
        with DirectWorker(forked=True) as worker:
            root = int(worker.run(request, (their_source, their_sink))['root'])
        os.close(their_source)
        os.close(their_sink)
        running.go()
        assert os.waitpid(root, 0) == (root, 0), running.output
        assert os.read(sink, 100) == b'done'
        assert os.read(sink, 100) == b''
        os.close(sink)
