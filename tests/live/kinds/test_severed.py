# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix stream sockets whose other end is gone: what is in them, and how they come back."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from ckptd.errors import CkptError, Refused
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel.netlink import unix_sockets
from ckptd.kernel.unix import clients_beside
from ckptd.objects.files.base import OpenFile, RestoreContext, read_open_file
from ckptd.objects.files.registry import kind_of
from ckptd.objects.files.severed import Disconnected, DisconnectedKind
from tests.live.kinds.conftest import Bulk

KIND = DisconnectedKind()
OPEN = Path('/proc/self/fd')
Half = Callable[..., socket.socket]


class Image:
    """As much of a RestoreContext as this kind asks for."""

    def __init__(self, bulk: Bulk) -> None:
        self._bulk = bulk

    def pread(self, extent: Extent, length: int, offset: int) -> bytes:
        return self._bulk.read(extent)[offset:offset + length]


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
    """Dumped, encoded, decoded, restored."""
    record = Disconnected.decode(kind_of(file).dump(file, bulk).encode())
    saved = SavedFile(1, 'severed', file.flags & ~os.O_CLOEXEC, 0, file.stat.st_mode, 0, 0, 0, file.link, b'')
    return socket.socket(fileno=KIND.restore(record, saved, cast(RestoreContext, Image(bulk))))


@pytest.mark.parametrize('said', [(), (b'last words',), (b'one', b'two', b'x' * 100_000)])
def test_what_was_said_and_then_the_end(half: Half, bulk: Bulk, said: tuple[bytes, ...]) -> None:
    mine = half(*said)
    file = own(mine)
    assert kind_of(file).tag == 'severed'
    assert KIND.refusals(file) == []
    whole = b''.join(said)
    with restored(file, bulk) as again:
        # each says the same, and the dump took nothing from the original
        for sock in (mine, again):
            assert b''.join(iter(lambda sock=sock: sock.recv(65536), b'')) == whole     # type: ignore[misc]
            with pytest.raises(BrokenPipeError):
                sock.send(b'x')
        assert kind_of(own(again)).tag == 'severed'
        assert own(again).flags == file.flags
        assert again.family == mine.family


def test_one_that_does_not_block(half: Half, bulk: Bulk) -> None:
    mine = half()
    mine.setblocking(False)
    with restored(own(mine), bulk) as again:
        assert own(again).flags == own(mine).flags
        assert own(again).flags & os.O_NONBLOCK


def test_more_than_fits(half: Half, bulk: Bulk) -> None:
    """A bound of the system, and not of ours, is said as such."""
    file = own(half())
    saved = SavedFile(1, 'severed', file.flags, 0, file.stat.st_mode, 0, 0, 0, file.link, b'')
    record = Disconnected(1, (bulk.add([bytes(64 << 20)]),))
    with pytest.raises(CkptError, match='67,108,864 bytes do not fit into a socket'):
        KIND.restore(record, saved, cast(RestoreContext, Image(bulk)))


def test_file_descriptors_in_it_are_refused(half: Half, bulk: Bulk) -> None:
    mine = half(b'take it', fds=(0,))
    file, before = own(mine), set(OPEN.iterdir())
    [reason] = KIND.refusals(file)
    assert reason.severity == 'refusal'
    with pytest.raises(Refused, match='file descriptors wait'):
        KIND.dump(file, bulk)
    assert set(OPEN.iterdir()) == before
    data, fds, _, _ = socket.recv_fds(mine, 100, 1)
    assert (data, len(fds)) == (b'take it', 1)
    os.close(fds[0])


def test_a_peek_position_would_move(half: Half) -> None:
    mine = half(b'12345')
    mine.setsockopt(socket.SOL_SOCKET, 42, 2)       # SO_PEEK_OFF
    assert kind_of(own(mine)).tag == 'unsupported'
    assert mine.recv(2, socket.MSG_PEEK) == b'34'


def test_one_that_is_cut_off_reads_nothing(bulk: Bulk) -> None:
    """A connection to the bus: what waits in it is of a life that ends."""
    mine, other = socket.socketpair()
    with mine, other:
        other.sendall(b'a reply')
        assert kind_of(own(mine)).tag == 'unsupported'
        file = replace(own(mine), severed=True)
        assert kind_of(file).tag == 'severed'
        [reason] = KIND.refusals(file)
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
