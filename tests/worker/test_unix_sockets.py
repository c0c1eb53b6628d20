# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix sockets of a tree: ends outside of it, images that lie about their queues, and what is refused by name."""

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import CkptError, TreeChanged
from ckptd.image.records import SavedFile
from ckptd.kernel.unix import peer_groups
from ckptd.objects.files.socket_filter import SocketFilter
from ckptd.objects.files.unix.record import UnixSocketEnd
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.lib.brood import Brood
from tests.lib.victim import Victim
from tests.worker.conftest import in_child
from tests.worker.driver import DirectWorker, Place, refusals
from tests.worker.test_restore_checks import checked

SO_ATTACH_BPF = 50                          # <asm-generic/socket.h>
BPF_JA, BPF_MOV_R0, BPF_EXIT = 0x05, 0xb7, 0x95     # <linux/bpf_common.h>, <linux/bpf.h>
BPF_PROG_LOAD, BPF_PROG_TYPE_SOCKET_FILTER = 5, 1   # <linux/bpf.h>
SYS_BPF = 321                               # <asm/unistd_64.h>

libc = ctypes.CDLL(None, use_errno=True)

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]


def test_an_end_outside_is_named(place: Place, brood: Brood) -> None:
    """The row has the process that holds the other end, and that it is no part of the tree."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        both, _ = brood.ask(lambda: theirs.fileno())
        assert place.checkpoint(both).is_dir()      # it has a copy of each end

        def close_mine() -> int:
            mine.close()
            return theirs.fileno()
        pid, fd = brood.ask(close_mine)
        [row] = refusals(place, pid)
    assert (row.errno, row.resource) == ('EOPNOTSUPP', f'fd {fd}')
    assert ', outside of the tree' in row.reason
    assert any(f'[{holder}]' in row.reason for holder in (os.getpid(), both))
    assert 'both ends' in row.hint
    assert '--external=any:close' in row.hint


@pytest.fixture
def image(victim: Callable[..., Victim], place: Place) -> Path:
    """The image of a tree with sockets of every sort; it is dead."""
    running = victim('unix_sockets')
    made = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    return made


def lie(image: Path, change: Callable[[UnixSocketEnd], UnixSocketEnd]) -> None:
    rewrite(image, SavedFile, lambda one: one if one.kind != 'unix' else replace(
        one, data=change(UnixSocketEnd.decode(one.data)).encode()))


def verified(place: Place, image: Path) -> Any:
    with DirectWorker() as worker:
        return worker.run(place.request(0, operation='verify', image=image.name))['damages']


def test_verify_looks_into_queues(place: Place, image: Path) -> None:
    assert verified(place, image) == []

    def dangling(end: UnixSocketEnd) -> UnixSocketEnd:
        return replace(end, queue=tuple(replace(message, files=tuple(9999 for _ in message.files))
                                        for message in end.queue))
    lie(image, dangling)
    damages = verified(place, image)
    assert damages
    assert all('refers to open file 9999, which is not in the image' in damage for damage in damages)
    rows = checked(place, image)
    assert {row.errno for row in rows if row.severity == 'refusal'} == {'EBADMSG'}


def test_a_maker_that_is_not_in_the_image_is_a_warning(place: Place, image: Path) -> None:
    lie(image, lambda end: replace(end, maker=replace(end.maker, vpid=0)))
    rows = checked(place, image)
    assert rows
    assert {row.severity for row in rows} == {'warning'}
    assert all('SO_PEERCRED' in row.hint or 'credentials' in row.hint for row in rows)


def test_numbers_that_no_socket_has(place: Place, image: Path) -> None:
    """A lie about a socket ends the restart with an error, and leaves nothing."""
    lie(image, lambda end: replace(end, type=77))
    with DirectWorker() as worker, pytest.raises(CkptError):
        worker.run(place.request(0, operation='restore', image=image.name))
    assert not place.freezes


def test_unaccepted_data_is_refused(place: Place, brood: Brood) -> None:
    """Only accept(2) reaches it. The tree goes on, and accepts it then."""
    name = f'\0ckptd-test-{os.getpid()}'

    def connect() -> int:
        server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        server.bind(name)
        server.listen()
        client.connect(name)
        client.send(b'12345')
        client.detach()
        return server.detach()
    pid, fd = brood.ask(connect)
    with pytest.raises(TreeChanged) as caught:
        place.checkpoint(pid)
    [row] = caught.value.refusals
    assert (caught.value.exit_status, row.errno, row.resource) == (75, 'EAGAIN', f'fd {fd}')
    assert f'a listening unix stream socket bound to @{name[1:]}' in row.reason


def test_unaccepted_data_of_a_tree_that_is_killed(place: Place, tmp_path: Path) -> None:
    """accept(2) comes last of all. One client has closed its end, and one has sent nothing."""
    program = tmp_path / 'program.py'
    program.write_text("""
import os, socket, struct
from victim import ready, wait_for_go
server = socket.socket(socket.AF_UNIX)
server.bind('socket')
server.listen()
clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
for number, client in enumerate(clients):
    client.connect('socket')
    if number != 1:
        client.send(b'12345')
clients[0].close()
ready()
wait_for_go()
first, second, third = [server.accept()[0] for _ in clients]
assert first.recv(100) == b'12345'
assert first.recv(100) == b''
clients[1].send(b'later')
assert second.recv(100) == b'later'
assert third.recv(100) == b'12345'
clients[2].send(b'more')
assert third.recv(100) == b'more'
for one in (first, second, third):
    assert struct.unpack('3I', one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0] == os.getpid()
""")
    with Victim('program', directory=tmp_path / 'victim', program=program) as running:
        with pytest.raises(TreeChanged):
            place.checkpoint(running.pid)
        image = place.checkpoint(running.pid, after='kill')
        running.process.wait()
        settled.reap_orphans()
        assert verified(place, image) == []
        with DirectWorker() as worker:
            root = int(worker.run(place.request(0, operation='restore', image=image.name))['root'])
        running.go()
        assert os.waitpid(root, 0) == (root, 0), running.output


def test_a_client_outside_is_named(place: Place, brood: Brood) -> None:
    """One that waits to be accepted, and the listener of one that does."""
    name = f'\0ckptd-test-{os.getpid()}'

    def listen() -> int:
        server = socket.socket(socket.AF_UNIX)
        server.bind(name)
        server.listen()
        return server.detach()
    pid, _ = brood.ask(listen)

    def connect() -> int:
        client = socket.socket(socket.AF_UNIX)
        client.connect(name)
        return client.detach()
    other, _ = brood.ask(connect)
    for one, peer in ((pid, other), (other, pid)):
        [row] = refusals(place, one)
        assert row.errno == 'EOPNOTSUPP'
        assert f'[{peer}], outside of the tree' in row.reason


def test_an_ebpf_filter_is_refused(place: Place, brood: Brood) -> None:
    def attach() -> int:
        code = ctypes.create_string_buffer(struct.pack('=BBhiBBhi', BPF_MOV_R0, 0, 0, -1, BPF_EXIT, 0, 0, 0))
        license_ = ctypes.create_string_buffer(b'GPL')
        about = ctypes.create_string_buffer(struct.pack('=IIQQ', BPF_PROG_TYPE_SOCKET_FILTER, 2, ctypes.addressof(code),
                                                        ctypes.addressof(license_)), 128)      # union bpf_attr
        program = libc.syscall(SYS_BPF, BPF_PROG_LOAD, about, 128)
        assert program >= 0
        sock = socket.socket(socket.AF_UNIX)
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program)
        os.close(program)
        return sock.detach()
    pid, fd = brood.ask(attach)
    [row] = refusals(place, pid)
    assert (row.errno, row.resource) == ('EOPNOTSUPP', f'fd {fd}')
    assert 'has an eBPF filter (SO_ATTACH_BPF)' in row.reason


def test_a_filter_that_the_kernel_rejects(place: Place, victim: Callable[..., Victim]) -> None:
    """A program that jumps out of itself, and half an instruction: the restart fails and leaves nothing."""
    running = victim('socket_filters')
    image = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    lie(image, lambda end: replace(end, filter=SocketFilter(struct.pack('=HBBI', BPF_JA, 0, 0, 1 << 20), 0)))
    with DirectWorker() as worker, pytest.raises(CkptError, match='its filter cannot be attached again'):
        worker.run(place.request(0, operation='restore', image=image.name))
    assert not place.freezes
    lie(image, lambda end: replace(end, filter=SocketFilter(b'half', 0)))
    assert any('a socket filter of 4 bytes' in damage for damage in verified(place, image))


@pytest.mark.parametrize('groups', [(), (1, 2, 3), tuple(range(1000, 2000))])
def test_groups_of_the_other_end(groups: tuple[int, ...]) -> None:
    """SO_PEERGROUPS, also of more groups than most processes have."""
    def look() -> None:
        os.setgroups(groups)
        one, other = socket.socketpair()
        with one, other:
            assert peer_groups(one) == groups
    assert os.waitstatus_to_exitcode(in_child(look)) == 0


def connect_for_ever() -> None:
    """Listen, connect, accept and close in two threads."""
    def connect() -> None:
        while True:
            with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
                listener.bind('')
                listener.listen()
                client.connect(listener.getsockname())
                listener.accept()[0].close()

    for _ in range(2):
        threading.Thread(target=connect, daemon=True).start()


def test_sockets_that_come_and_go_are_not_refused(forked: Callable[..., int], place: Place) -> None:
    """Those of a running tree are others than in the table, which is read once. At rest they are the same."""
    pid = forked(connect_for_ever)
    for _ in range(5):
        with DirectWorker() as worker:
            rows = worker.run(place.request(pid, 'check'))['refusals']
        assert [row['reason'] for row in rows if row['severity'] == 'refusal'] == []
        place.checkpoint(pid)
