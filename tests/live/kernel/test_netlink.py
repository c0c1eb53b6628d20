# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fork events and unix sockets."""

import os
import select
import socket
import struct
from pathlib import Path

import pytest

from ckptd.kernel import netlink
from ckptd.kernel.netlink import ForkWatch, TaskEvent, unix_sockets


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


@pytest.fixture
def watch() -> ForkWatch:
    with ForkWatch() as watch:
        if not watch.available:
            pytest.skip(f'needs the proc connector: {watch.reason}')
    return ForkWatch()


def test_a_life_is_seen(watch: ForkWatch) -> None:
    with watch:
        assert (watch.available, watch.lost, watch.reason) == (True, False, '')
        pid = os.posix_spawn('/bin/false', ['false'], {})
        os.waitpid(pid, 0)
        seen: list[TaskEvent] = []
        while not any(event.kind == 'exit' and event.tid == pid for event in seen):
            assert select.select([watch], [], [], 5)[0]
            seen += watch.read()
        mine = [event for event in seen if event.tid == pid]
        assert mine == [TaskEvent('fork', pid, pid, os.getpid(), 0), TaskEvent('exit', pid, pid, os.getpid(), 256)]
        assert not watch.lost


def test_an_overrun_is_noticed(watch: ForkWatch) -> None:
    with watch:
        assert watch._socket is not None
        watch._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(20):
            os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)
        watch.read()
        watch.read()
        assert watch.lost


def test_after_the_end_it_only_says_so(watch: ForkWatch) -> None:
    with watch:
        pass
    assert (watch.fileno(), watch.read(), watch.lost, watch.available) == (-1, [], True, False)


def test_nonsense_is_an_overrun_too() -> None:
    def event(what: int, *numbers: int) -> bytes:
        body = struct.pack(f'={len(numbers)}I', *numbers)
        return struct.pack('=IHHII', 52 + len(body), 3, 0, 0, 0) + bytes(20) + struct.pack('=IIQ', what, 0, 0) + body
    fork, end = event(1, 5, 5, 6, 6), event(0x80000000, 6, 6, 256, 17, 5, 5)
    assert list(netlink._task_events(fork + event(2, 1, 1) + end)) == [
        TaskEvent('fork', 6, 6, 5, 0), TaskEvent('exit', 6, 6, 5, 256)]
    for bad in (fork[:-4], event(1), struct.pack('=IHHII', 0, 3, 0, 0, 0) + bytes(64)):
        with pytest.raises((struct.error, ValueError)):
            list(netlink._task_events(bad))


def test_peers_and_queues() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.send(b'12345')
        found = unix_sockets()
        assert found[inode(left)].peer == inode(right)
        assert found[inode(right)].peer == inode(left)
        assert found[inode(right)].queued >= 1
        assert found[inode(left)].name == b''


@pytest.mark.parametrize('name', [b'\0abstract\xff\0x', b'\0', b'plain', b'not \xff utf-8\n'])
def test_names_of_any_bytes(name: bytes, tmp_path: Path) -> None:
    path = name if name.startswith(b'\0') else bytes(tmp_path) + b'/' + name
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen(3)
        client.connect(path)
        found = unix_sockets()[inode(listener)]
        assert (found.name, found.type, len(found.pending)) == (path, socket.SOCK_STREAM, 1)
        assert (found.queued, found.unsent) == (1, 3)
        if not name.startswith(b'\0'):
            at = Path(os.fsdecode(path)).stat()
            assert found.file == (os.major(at.st_dev), os.minor(at.st_dev), at.st_ino % 2**32)


def test_all_of_ours_in_proc_net_unix() -> None:
    pairs = [socket.socketpair() for _ in range(200)]       # more than one datagram tells of
    mine = {inode(sock) for pair in pairs for sock in pair}
    listed = {int(line.split()[6]) for line in Path('/proc/net/unix').read_text(errors='replace').splitlines()[1:]}
    found = unix_sockets().keys()
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()
    assert mine == mine & listed == mine & found
