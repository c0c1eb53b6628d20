# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections of unix sockets to processes outside of the tree, and policies for them (--external)."""

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.errors import Finding, Refused
from ckptd.kernel.clone import CLONE_NEWNS
from ckptd.kernel.mount import MS_PRIVATE, MS_REC, mount
from ckptd.kernel.prctl import PR_SET_CHILD_SUBREAPER, prctl
from ckptd.kernel.timens import unshare
from tests.lib import settled
from tests.lib.victim import Victim
from tests.worker.conftest import in_child
from tests.worker.driver import DirectWorker, Place
from tests.worker.test_restore_checks import checked

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

CLIENT = """
import socket, sys
from victim import ready, wait_for_go
kind, name, end = getattr(socket, sys.argv[1]), sys.argv[2].replace('@', chr(0)), sys.argv[3]
client = socket.socket(socket.AF_UNIX, kind)
client.connect(name)
client.send(b'first')
ready()
wait_for_go()
if end == 'closed':
    assert client.recv(100) == b'unread'
    assert client.recv(100) == b''
    try:
        client.send(b'x')
        raise AssertionError('nobody is there')
    except BrokenPipeError:
        pass
else:
    client.send(b'second')
"""


class Client:
    """A client in the tree, whose server is this process."""

    def __init__(self, directory: Path, kind: str, name: str, end: str) -> None:
        program = directory / 'client.py'
        program.write_text(CLIENT)
        self.victim = Victim('client', kind, name, end, directory=directory / 'victim', program=program)

    def killed(self, place: Place, **more: object) -> Path:
        image = place.checkpoint(self.victim.pid, after='kill', **more)
        self.victim.process.wait()
        settled.reap_orphans()
        return image

    def restored(self, place: Place, image: Path) -> int:
        with DirectWorker() as worker:
            return int(worker.run(place.request(0, operation='restore', image=image.name))['root'])

    def end(self, root: int) -> None:
        self.victim.go()
        assert os.waitpid(root, 0) == (root, 0), self.victim.output


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Callable[[str, str, str], Client]]:
    made: list[Client] = []

    def make(kind: str, name: str, end: str) -> Client:
        made.append(Client(tmp_path, kind, name, end))
        made[0].victim.__enter__()
        return made[0]
    yield make
    for one in made:
        one.victim.__exit__(None, None, None)


@pytest.fixture
def name() -> str:
    return f'@ckptd-test-{os.getpid()}'


@pytest.fixture
def server(name: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name.replace('@', '\0'))
        sock.listen()
        yield sock


def rows_of(place: Place, pid: int, **more: object) -> list[Finding]:
    with pytest.raises(Refused) as caught:
        place.checkpoint(pid, **more)
    return list(caught.value.refusals)


def test_a_refusal_names_the_peer(place: Place, client: Callable[..., Client], server: socket.socket,
                                  name: str) -> None:
    one = client('SOCK_STREAM', name, 'closed')
    with server.accept()[0]:
        for policies in ((), (f'{name}:refuse',), ('any:close', f'{name}:refuse'), ('@another:close',)):
            [row] = rows_of(place, one.victim.pid, external=policies)
            assert f'[{os.getpid()}]' in row.reason
            assert f'({name})' in row.reason
            assert f'--external={name}:close' in row.hint


@pytest.mark.parametrize('policies', [('{}:close',), ('any:close',), ('any:refuse', '{}:close')])
def test_close(place: Place, client: Callable[..., Client], server: socket.socket, name: str,
               policies: tuple[str, ...]) -> None:
    """Unread data comes before the end."""
    one = client('SOCK_STREAM', name, 'closed')
    with server.accept()[0] as accepted:
        accepted.send(b'unread')
        image = one.killed(place, external=tuple(policy.format(name) for policy in policies))
        assert accepted.recv(100) == b'first'
    root = one.restored(place, image)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    one.end(root)


def test_reconnect(place: Place, client: Callable[..., Client], server: socket.socket, name: str) -> None:
    """The server sees a new connection of the same process."""
    one = client('SOCK_STREAM', name, 'again')
    with server.accept()[0]:
        image = one.killed(place, external=(f'{name}:reconnect',))
    root = one.restored(place, image)
    with server.accept()[0] as accepted:
        assert struct.unpack('3i', accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0] == root
        one.end(root)
        assert accepted.recv(100) == b'second'


def test_reconnect_by_path(place: Place, client: Callable[..., Client], tmp_path: Path) -> None:
    """Datagrams, and a server that is gone at the restart."""
    path = tmp_path / 'server'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        one = client('SOCK_DGRAM', str(path), 'again')
        image = one.killed(place, external=(f'{path}:reconnect',))
        root = one.restored(place, image)
        one.end(root)
        assert [server.recv(100) for _ in range(2)] == [b'first', b'second']
    [row] = [row for row in checked(place, image) if row.severity == 'refusal']
    assert (row.errno, row.hint) == ('ECONNREFUSED', 'start that server')
    assert str(path) in row.reason


@contextmanager
def connecting(sock: socket.socket, path: Path) -> Iterator[None]:
    """Connect a socket as soon as there is a server, and send a message."""
    def connect() -> None:
        while not is_connected():
            os.sched_yield()
        sock.send(b'from outside')

    def is_connected() -> bool:
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True
    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_servers_end(place: Place, tmp_path: Path) -> None:
    """Clients outside of a server in the tree, one of them not accepted yet: a connection can be closed, and not made
    again."""
    program, path = tmp_path / 'server.py', tmp_path / 'socket'
    program.write_text("""
import socket, sys
from victim import ready, wait_for_go
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
accepted, _ = server.accept()
ready()
wait_for_go()
assert accepted.recv(100) == b'from outside'
assert accepted.recv(100) == b''
server.setblocking(False)
try:
    server.accept()
    raise AssertionError('the client that waited is gone')
except BlockingIOError:
    pass
""")
    with socket.socket(socket.AF_UNIX) as outside, socket.socket(socket.AF_UNIX) as waiting, \
            connecting(outside, path), \
            Victim('server', str(path), directory=tmp_path / 'victim', program=program) as running:
        waiting.connect(str(path))
        waiting.send(b'dropped')
        rows = rows_of(place, running.pid, external=('any:reconnect',))
        assert {row.errno for row in rows} == {'EOPNOTSUPP'}
        assert all(f'({path})' in row.reason for row in rows)
        image = place.checkpoint(running.pid, after='kill', external=('any:close',))
        running.process.wait()
        settled.reap_orphans()
        with DirectWorker() as worker:
            root = int(worker.run(place.request(0, operation='restore', image=image.name))['root'])
        running.go()
        assert os.waitpid(root, 0) == (root, 0), running.output


def test_the_journal_is_connected_again_without_asking(tmp_path: Path) -> None:
    """Seven header lines come first. The test has a /run of its own."""
    def work() -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)        # the restored tree becomes ours
        unshare(CLONE_NEWNS)
        mount(None, b'/', None, MS_REC | MS_PRIVATE, None)
        mount(b'tmpfs', b'/run', b'tmpfs', 0, None)
        path = Path('/run/systemd/journal/stdout')
        path.parent.mkdir(parents=True)
        place = Place(tmp_path).make()
        with socket.socket(socket.AF_UNIX) as journal:
            journal.bind(str(path))
            journal.listen()
            one = Client(tmp_path, 'SOCK_STREAM', str(path), 'again')
            with one.victim:
                with journal.accept()[0] as first:
                    assert first.recv(100) == b'first'
                    first.shutdown(socket.SHUT_WR)
                    image = one.killed(place)
                root = one.restored(place, image)
                with journal.accept()[0] as second:
                    assert second.recv(1000).split(b'\n')[1:] == [b'', b'6', b'1', b'0', b'0', b'0', b'']
                    one.end(root)
                    assert second.recv(100) == b'second'
    assert os.waitstatus_to_exitcode(in_child(work)) == 0
