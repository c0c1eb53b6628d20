# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix sockets whose other end is gone: what is in them, and how they come back."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import CkptError
from ckptd.image.records import SavedFile
from ckptd.kernel.netlink import unix_sockets
from ckptd.kernel.unix import clients_beside
from ckptd.objects.files.base import OpenFile, read_open_file
from ckptd.objects.files.unix.messages import Sender, UnixMessage
from ckptd.objects.files.unix.record import UnixSocketEnd
from tests.live.kinds.conftest import Bulk, Restart, kind_of, saved_of

OPEN = Path('/proc/self/fd')
Half = Callable[..., socket.socket]


def own(sock: socket.socket) -> OpenFile:
    return read_open_file(os.getpid(), sock.fileno())


@pytest.fixture
def half() -> Iterator[Half]:
    """half(b'...', ...): one end of a pair, whose other end has sent this and was closed."""
    made: list[socket.socket] = []

    def make(*said: bytes, fds: tuple[int, ...] = ()) -> socket.socket:
        mine, other = socket.socketpair()
        made.append(mine)
        with other:
            for piece in said:
                socket.send_fds(other, [piece], fds) if fds else other.sendall(piece)
        return mine

    yield make
    for one in made:
        one.close()


def restored(file: OpenFile, bulk: Bulk) -> socket.socket:
    """Dumped, encoded, decoded, restored; its other end is closed with the restart."""
    restart = Restart(bulk)
    fd = os.dup(restart.whole(saved_of(file, bulk)))
    restart.close()
    return socket.socket(fileno=fd)


@pytest.mark.parametrize('said', [(), (b'last words',), (b'one', b'two', b'x' * 100_000)])
def test_what_was_said_and_then_the_end(half: Half, bulk: Bulk, said: tuple[bytes, ...]) -> None:
    mine = half(*said)
    file = own(mine)
    assert kind_of(file).tag == 'unix'
    assert kind_of(file).findings(file) == []
    whole = b''.join(said)
    with restored(file, bulk) as again:
        # each says the same, and the dump took nothing from the original
        for sock in (mine, again):
            assert b''.join(iter(lambda sock=sock: sock.recv(65536), b'')) == whole     # type: ignore[misc]
            with pytest.raises(BrokenPipeError):
                sock.send(b'x')
        assert kind_of(own(again)).tag == 'unix'
        assert own(again).flags == file.flags
        assert again.family == mine.family


def test_one_that_does_not_block(half: Half, bulk: Bulk) -> None:
    mine = half()
    mine.setblocking(False)
    with restored(own(mine), bulk) as again:
        assert own(again).flags == own(mine).flags
        assert own(again).flags & os.O_NONBLOCK


@pytest.mark.needs('root')
def test_more_than_fits(half: Half, bulk: Bulk) -> None:
    """A bound of the system, and not of ours, is named as such."""
    file = own(half())
    message = UnixMessage((bulk.add([bytes(64 << 20)]),), (), (), 0)
    record = UnixSocketEnd(1, socket.SOCK_STREAM, 0, 1, 0, Sender(0, 0, 0), (), 0, 0, (), (message,))
    saved = SavedFile(1, 'unix', file.flags, 0, file.stat.st_mode, 0, 0, 0, file.link, record.encode())
    restart = Restart(bulk)
    try:
        os.seteuid(65534)       # root may exceed it
        with pytest.raises(CkptError, match='a message of 67,108,864 bytes does not fit into the socket'):
            restart.whole(saved)
    finally:
        os.seteuid(0)
        restart.close()


def test_file_descriptors_in_it_come_along(half: Half, bulk: Bulk) -> None:
    mine = half(b'take it', fds=(0,))
    file, before = own(mine), set(OPEN.iterdir())
    kind = kind_of(file)
    assert kind.findings(file) == []
    [fd] = kind.discover(file)
    assert os.path.sameopenfile(fd, 0)
    [message] = UnixSocketEnd.decode(kind.dump(file, bulk).encode()).queue
    assert (message.files, bulk.in_flight) == ((1,), [fd])
    kind.close()
    assert set(OPEN.iterdir()) == before
    data, fds, _, _ = socket.recv_fds(mine, 100, 1)
    assert (data, len(fds)) == (b'take it', 1)
    os.close(fds[0])


def test_a_peek_position_stays(half: Half, bulk: Bulk) -> None:
    mine = half(b'12345')
    mine.setsockopt(socket.SOL_SOCKET, 42, 2)       # SO_PEEK_OFF
    with restored(own(mine), bulk) as again:
        for sock in (mine, again):
            assert sock.recv(2, socket.MSG_PEEK) == b'34'
            assert sock.recv(9) == b'12345'


def test_one_that_is_cut_off_reads_nothing(bulk: Bulk) -> None:
    """A connection to the bus: what waits in it is of a life that ends."""
    mine, other = socket.socketpair()
    with mine, other:
        other.sendall(b'a reply')
        file = replace(own(mine), severed=True)
        assert kind_of(file).tag == 'unix'
        [reason] = kind_of(file).findings(file)
        assert reason.severity == 'warning'
        with restored(file, bulk) as again:
            assert again.recv(100) == b''
        assert mine.recv(100) == b'a reply'


def test_clients_of_one_server(tmp_path: Path) -> None:
    """By name and by file: another server may have taken the name meanwhile."""
    path = tmp_path / 'socket'
    made: list[socket.socket] = []

    def serve() -> socket.socket:
        server = socket.socket(socket.AF_UNIX)
        made.append(server)
        server.bind(str(path))
        server.listen()
        return server

    def connect(server: socket.socket) -> int:
        client = socket.socket(socket.AF_UNIX)
        made.append(client)
        client.connect(str(path))
        made.append(server.accept()[0])
        return os.fstat(client.fileno()).st_ino
    try:
        first = serve()
        clients = [connect(first) for _ in range(3)]
        path.unlink()
        other = connect(serve())
        sockets = unix_sockets()
        for client in clients:
            assert clients_beside(client, sockets) == set(clients)
        assert clients_beside(other, sockets) == {other}
        listener = os.fstat(first.fileno()).st_ino
        assert clients_beside(listener, sockets) == set()
        assert clients_beside(1, sockets) == set()
    finally:
        for sock in made:
            sock.close()


@pytest.mark.needs('root')
def test_credentials_are_sent_again_by_root_alone(bulk: Bulk) -> None:
    mine, other = socket.socketpair()
    with mine, other:
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        other.sendall(b'from me')
        saved = saved_of(own(mine), bulk)
    restart = Restart(bulk)
    try:
        assert restart.obstacles(saved) == []
        os.seteuid(65534)
        [(severity, errno, reason)] = restart.obstacles(saved)
    finally:
        os.seteuid(0)
        restart.close()
    assert (severity, errno) == ('refusal', 'EPERM')
    assert 'with the credentials of their senders' in reason
