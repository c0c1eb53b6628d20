# SPDX-License-Identifier: LGPL-2.1-or-later
"""TCP connections within a tree: full queues, what is refused, a worker that dies in repair mode, images that lie."""

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import CkptError
from ckptd.image.records import SavedFile
from ckptd.journal.recover import recover
from ckptd.journal.store import Journal
from ckptd.kernel.inet_diag import inet_sockets
from ckptd.kernel.tcp import TCP_REPAIR
from ckptd.objects.files.inet.socket import InetAddress
from ckptd.objects.files.tcp.record import TcpConnection
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.lib.brood import Brood
from tests.lib.victim import Victim
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, as_user, place_of, refusals
from tests.worker.test_inet_sockets import reaped, restored, sockets_of
from tests.worker.test_restore_checks import checked
from tests.worker.test_tcp_keep import shown_by_ss

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

# sends until nothing fits any more and shuts down; after SIGUSR1 reads all of it and says what the digest is
FULL = '''
import hashlib, os, signal, socket, sys
server = socket.create_server(('127.0.0.1', 0))
client = socket.create_connection(server.getsockname())
end = server.accept()[0]
client.setblocking(False)
digest, block = hashlib.sha256(), os.urandom(1 << 20)
try:
    while True:
        digest.update(block[:client.send(block)])
except BlockingIOError:
    pass
client.shutdown(socket.SHUT_WR)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print('ready', flush=True)
signal.sigwait([signal.SIGUSR1])
found = hashlib.sha256()
while data := end.recv(1 << 20):
    found.update(data)
sys.exit(7 if found.digest() == digest.digest() else 1)
'''
ASYNCIO = '''
import asyncio, signal, sys
async def serve(reader, writer):
    while line := await reader.readline():
        writer.write(b'echo ' + line)
        await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, '127.0.0.1', 0)
    clients = [await asyncio.open_connection(*server.sockets[0].getsockname()) for _ in range(5)]
    go = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, go.set)
    for number, (reader, writer) in enumerate(clients):
        writer.write(b'%d\\n' % number)
        assert await reader.readline() == b'echo %d\\n' % number
    print('ready', flush=True)
    await go.wait()
    clients += [await asyncio.open_connection(*server.sockets[0].getsockname())]
    for number, (reader, writer) in enumerate(clients):
        writer.write(b'again %d\\n' % number)
        assert await reader.readline() == b'echo again %d\\n' % number
        writer.close()
    sys.exit(7)
asyncio.run(main())
'''
HTTP = '''
import http.client, http.server, signal, sys, threading
class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', '5')
        self.end_headers()
        self.wfile.write(b'hello')
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
threading.Thread(target=server.serve_forever, daemon=True).start()
client = http.client.HTTPConnection(*server.server_address)
def get():
    client.request('GET', '/')
    assert client.getresponse().read() == b'hello'
get()
kept = client.sock
print('ready', flush=True)
signal.sigwait([signal.SIGUSR1])
get()
assert client.sock is kept
sys.exit(7)
'''


@contextmanager
def program(source: str, *arguments: str) -> Iterator['subprocess.Popen[bytes]']:
    """A program that has said that it is ready."""
    process = subprocess.Popen([sys.executable, '-c', source, *arguments], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b'ready\n'
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize('source', [FULL, ASYNCIO, HTTP], ids=['full', 'asyncio', 'http'])
def test_programs_go_on(place: Place, source: str) -> None:
    """After a checkpoint, and after a restart of another one."""
    with program(source) as running:
        place.checkpoint(running.pid)
        image = place.checkpoint(running.pid, after='kill')
        running.wait()
    settled.reap_orphans()
    pid = restored(place, image)
    os.kill(pid, signal.SIGUSR1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


# four connections, whose options were set before and after the handshake
AGREED = """
import signal, socket
TCP, SOL = socket.IPPROTO_TCP, socket.SOL_SOCKET
def bound():
    one = socket.socket()
    one.bind(('127.0.0.1', 0))
    return one
def pair(of_client, of_server):
    # after a restart the end with the lower port accepts
    server, client = sorted((bound(), bound()), key=socket.socket.getsockname)
    for one, options in ((server, of_server), (client, of_client)):
        for option in options:
            one.setsockopt(*option)
    with server:
        server.listen()
        client.connect(server.getsockname())
        return client, server.accept()[0]
kept = [pair([], []), pair([(TCP, socket.TCP_MAXSEG, 1000), (SOL, socket.SO_RCVBUF, 1 << 19)], []),
        pair([], [(TCP, socket.TCP_WINDOW_CLAMP, 20000)]), pair([], [(SOL, socket.SO_RCVBUF, 5000)])]
for one in (end for ends in kept for end in ends):
    for option in ((TCP, socket.TCP_CONGESTION, b'reno'), (TCP, socket.TCP_USER_TIMEOUT, 9000), (SOL, 47, 1000000)):
        one.setsockopt(*option)
print('ready', flush=True)
signal.pause()
"""


def shown(pid: int) -> dict[int, list[str]]:
    """What ss(8) says of the connections of a process, but for what it counts and measures, by fd."""
    with sockets_of(pid) as found:
        return {fd: shown_by_ss(f'sport = :{one.getsockname()[1]} and dport = :{one.getpeername()[1]}')
                for fd, one in found.items() if one.family == socket.AF_INET}


def test_ss_shows_the_same(place: Place) -> None:
    with program(AGREED) as running:
        before = shown(running.pid)
        image = place.checkpoint(running.pid, after='kill')
        running.wait()
    settled.reap_orphans()
    assert len({word for words in before.values() for word in words if word.startswith('wscale:')}) > 3
    pid = restored(place, image)
    with reaped(pid):
        assert shown(pid) == before


@pytest.mark.parametrize('source', [FULL, ASYNCIO, HTTP], ids=['full', 'asyncio', 'http'])
def test_a_checkpoint_does_not_harm_them(place: Place, source: str) -> None:
    with program(source) as running:
        place.checkpoint(running.pid)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(30) == 7


def test_a_killed_tree_leaves_no_port_behind(place: Place) -> None:
    with program(ASYNCIO) as running:
        with sockets_of(running.pid) as found:
            ports = {one.getsockname()[1] for one in found.values() if one.family == socket.AF_INET}
        assert len(ports) == 6
        place.checkpoint(running.pid, after='kill')
        running.wait()
    assert [one for one in inet_sockets(socket.IPPROTO_TCP) if {one.local.port, one.peer.port} & ports] == []


def test_a_user_cannot_read_what_was_not_delivered() -> None:
    def work() -> None:
        place = Place(Path.cwd()).make()
        with program(FULL) as running:
            with pytest.raises(CkptError, match='only root can read them') as caught:
                place.checkpoint(running.pid, forked=True, freeze='ptrace')
            assert caught.value.errno == errno.EAGAIN
            running.send_signal(signal.SIGUSR1)
            assert running.wait(30) == 7

    with place_of(ORDINARY_UID) as home:
        as_user(ORDINARY_UID, home, work)


@pytest.mark.parametrize('point', ['queue-in-repair', 'queue-walked'])
def test_a_worker_that_dies_leaves_no_socket_in_repair(place: Place, point: str) -> None:
    with program(FULL) as running:
        with DirectWorker(env={'CKPTD_FAULT': f'{point}=kill'}) as worker, pytest.raises(
                (AssertionError, ConnectionResetError)):
            worker.run(place.request(running.pid))
        if point == 'queue-in-repair':
            with sockets_of(running.pid) as found:
                assert sum(one.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR) for one in found.values()) == 2
        sentences = recover(Journal(place.runtime))
        assert 'reading the send queues' in sentences[0]        # before the tree runs
        recover(Journal(place.runtime), files=True)
        with sockets_of(running.pid) as found:
            for one in found.values():
                assert one.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR) == 0
                assert one.getsockopt(socket.SOL_SOCKET, 42) == -1      # SO_PEEK_OFF
        running.send_signal(signal.SIGUSR1)
        assert running.wait(30) == 7


# ---------------------------------------------------------------- refused

def test_an_end_outside_is_named(place: Place, brood: Brood) -> None:
    with socket.create_server(('127.0.0.1', 0)) as server:
        address = server.getsockname()

        def connect() -> int:
            server.close()
            return socket.create_connection(address).detach()
        pid, fd = brood.ask(connect)
        with server.accept()[0]:
            [row] = refusals(place, pid)
    assert (row.errno, row.resource) == ('EOPNOTSUPP', f'fd {fd}')
    assert f'a TCP connection to 127.0.0.1:{address[1]} (' in row.reason
    assert f'[{os.getpid()}]), outside of the tree' in row.reason


OUTSIDE = '''
import signal, socket, sys
client = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print('ready', flush=True)
signal.sigwait([signal.SIGUSR1])
assert client.recv(100) == b'before'
try:
    client.recv(100)
except ConnectionResetError:
    sys.exit(7)
'''


def connect_for_ever() -> None:
    """Connect, accept and close in two threads."""
    def connect() -> None:
        with socket.create_server(('127.0.0.1', 0)) as listener:
            while True:
                with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as accepted:
                    client.sendall(b'hello')
                    accepted.recv(5)

    for _ in range(2):
        threading.Thread(target=connect, daemon=True).start()


def test_connections_that_come_and_go_are_not_outside(forked: Callable[..., int], place: Place) -> None:
    """Those of a running tree are others in its fd tables, in the table of all sockets, and a moment later."""
    pid = forked(connect_for_ever)
    for _ in range(5):
        with DirectWorker() as worker:
            rows = worker.run(place.request(pid, 'check'))['refusals']
        assert [row['reason'] for row in rows if row['severity'] == 'refusal' and row['errno'] != 'EAGAIN'] == []


@pytest.mark.parametrize('what', ['tcp:127.0.0.1:{}', 'any'])
def test_a_connection_to_the_outside_that_a_policy_closes(place: Place, what: str) -> None:
    """After the restart it has what was unread, and then a reset. A row says so; without the policy it is refused."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        with program(OUTSIDE, str(port)) as running, server.accept()[0] as far:
            far.sendall(b'before')
            [row] = refusals(place, running.pid)
            assert f'--external=tcp:127.0.0.1:{port}:close' in row.hint
            policy = f'{what.format(port)}:close'
            with DirectWorker() as worker:
                result = worker.run(place.request(running.pid, external=[policy]))
                assert [row['hint'] for row in result['warnings'] if row['errno'] == 'ECONNRESET'] == [
                    'after a restart its peer has reset it']
            image = place.checkpoint(running.pid, after='kill', external=[policy])
            running.wait()
            with pytest.raises(ConnectionResetError):
                far.recv(1)
        settled.reap_orphans()
        pid = restored(place, image)
        os.kill(pid, signal.SIGUSR1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_unread_bytes_of_an_unaccepted_connection(place: Place, brood: Brood) -> None:
    """A checkpoint says EAGAIN, and accept(2) still reads them."""
    def wait() -> list[int]:
        server = socket.create_server(('127.0.0.1', 0))
        client = socket.create_connection(server.getsockname())
        client.sendall(b'hello')
        return [server.detach(), client.detach()]
    pid, (listener, client) = brood.ask(wait)
    with pytest.raises(CkptError, match='has not accepted') as caught:
        place.checkpoint(pid)
    assert (caught.value.errno, caught.value.exit_status) == (errno.EAGAIN, 75)
    with sockets_of(pid) as found, found[listener].accept()[0] as accepted:
        assert accepted.recv(10) == b'hello'
        assert accepted.getpeername() == found[client].getsockname()


# clients that nobody has accepted: with 5 bytes; without any; with an urgent byte, and more than the queue of the other
# end takes; shut down. After SIGUSR1 it accepts those of the tree and compares
UNACCEPTED = """
import signal, socket, sys
server = socket.create_server(('127.0.0.1', int(sys.argv[1])))
clients = [socket.create_connection(server.getsockname()) for _ in range(4)]
bulk = bytes(range(256)) * 1200
clients[2].settimeout(10)
clients[2].send(b'before')
clients[2].send(b'!', socket.MSG_OOB)
clients[2].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
clients[2].sendall(bulk)
clients[0].sendall(b'hello')
clients[3].sendall(b'last')
clients[3].shutdown(socket.SHUT_WR)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print('ready', flush=True)
signal.sigwait([signal.SIGUSR1])
ends = [server.accept() for _ in clients]
assert [name for _, name in ends] == [one.getsockname() for one in clients]
one, none, many, shut = (end for end, _ in ends)
assert one.recv(100) == b'hello'
assert [many.recv(100), many.recv(1, socket.MSG_OOB)] == [b'before', b'!']
assert many.recv(len(bulk), socket.MSG_WAITALL) == bulk
assert [shut.recv(100), shut.recv(100)] == [b'last', b'']
for end, client in zip((one, none, many, shut), clients):
    end.sendall(b'answer')
    assert client.recv(100) == b'answer'
server.setblocking(False)
try:
    server.accept()
except BlockingIOError:
    sys.exit(7)
"""


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as one:
        return int(one.getsockname()[1])


def test_a_killed_tree_keeps_what_nobody_has_accepted(place: Place) -> None:
    """Through two restarts. A client outside of the tree is dropped, and a warning counts it."""
    port = free_port()
    with program(UNACCEPTED, str(port)) as running, socket.create_connection(('127.0.0.1', port)) as stranger:
        stranger.sendall(b'who are you')
        with DirectWorker() as worker:
            result = worker.run(place.request(running.pid, after='kill'))
        assert [row['reason'] for row in result['warnings'] if 'wait to be accepted' in row['reason']] == [
            f'1 connections to 127.0.0.1:{port} from outside of the tree wait to be accepted']
        running.wait()
        with pytest.raises(ConnectionResetError):
            stranger.recv(1)
    settled.reap_orphans()
    pid = restored(place, place.spool / str(result['image']))
    again = place.checkpoint(pid, after='kill')
    os.waitpid(pid, 0)
    pid = restored(place, again)
    os.kill(pid, signal.SIGUSR1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_user_keeps_what_nobody_has_accepted() -> None:
    def work() -> None:
        place = Place(Path.cwd()).make()
        with program(UNACCEPTED, str(port)) as running:
            image = place.checkpoint(running.pid, forked=True, freeze='ptrace', after='kill')
            running.wait()
        found: list[TcpConnection] = []
        lie(image, lambda one: found.append(one) or one)        # type: ignore[func-returns-value]
        lengths = [sum(extent.length for extent in (*one.data, *one.later)) for one in found]
        assert (lengths, [one.urgent for one in found]) == ([5, 0, 6 + 307_200, 4], [b'', b'', b'!', b''])

    port = free_port()
    with place_of(ORDINARY_UID) as home:
        as_user(ORDINARY_UID, home, work)


def test_a_pending_error_is_refused(place: Place, brood: Brood) -> None:
    def reset() -> int:
        server = socket.create_server(('127.0.0.1', 0))
        client = socket.create_connection(server.getsockname())
        end = server.accept()[0]
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        end.close()
        server.close()
        return client.detach()
    pid, fd = brood.ask(reset)
    [row] = refusals(place, pid)
    assert (row.errno, row.resource) == ('EIO', f'fd {fd}')


def test_mptcp_connections_are_refused(place: Place, brood: Brood) -> None:
    def connect() -> list[int]:
        server = socket.socket(proto=socket.IPPROTO_MPTCP)
        server.bind(('127.0.0.1', 0))
        server.listen()
        client = socket.socket(proto=socket.IPPROTO_MPTCP)
        client.connect(server.getsockname())
        return [client.detach(), server.accept()[0].detach(), server.detach()]
    pid, fds = brood.ask(connect)
    rows = refusals(place, pid)
    assert {row.resource for row in rows} == {f'fd {fd}' for fd in fds[:2]}
    assert all('an MPTCP connection to 127.0.0.1:' in row.reason for row in rows)


# ---------------------------------------------------------------- images that lie

@pytest.fixture
def image(victim: Callable[..., Victim], place: Place) -> Path:
    running = victim('tcp_connections')
    made = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    return made


def lie(image: Path, change: Callable[[TcpConnection], Any]) -> None:
    rewrite(image, SavedFile, lambda one: one if one.kind != 'tcp-connection' else replace(
        one, data=change(TcpConnection.decode(one.data)).encode()))


LIES: dict[str, Callable[[TcpConnection], TcpConnection]] = {
    'no peer': lambda one: replace(one, peer=()) if one.other == 1 else one,
    'a peer elsewhere': lambda one: replace(one, peer=(InetAddress('192.0.2.1', 9, 0, 0),), peer_family=2)
    if one.other == 1 else one,
    'a name': lambda one: replace(one, peer=(InetAddress('example.invalid', 9, 0, 0),)) if one.peer else one,
    'a family': lambda one: replace(one, peer_family=77),
    'no other end': lambda one: replace(one, other=1, peer=(InetAddress('127.0.0.1', 9, 0, 0),), peer_family=2)
    if one.socket.family == 2 else one,
}


@pytest.mark.parametrize('what', LIES)
def test_an_image_that_lies_ends_with_an_error(place: Place, image: Path, what: str) -> None:
    lie(image, LIES[what])
    checked(place, image)       # says what it says, and does not fail
    with DirectWorker() as worker, pytest.raises(CkptError):
        worker.run(place.request(0, operation='restore', image=image.name))
    assert not place.freezes


def test_its_addresses_in_use_are_named(place: Place, image: Path) -> None:
    ports: list[int] = []
    lie(image, lambda one: (ports.append(one.socket.bound[0].port) if one.other == 1 else None, one)[1])
    with socket.create_server(('127.0.0.1', ports[0])):
        rows = [row for row in checked(place, image) if row.severity == 'refusal']
        assert rows
        assert all(f'127.0.0.1:{ports[0]} is in use by ' in row.reason and f'[{os.getpid()}]' in row.reason
                   for row in rows)
    with reaped(restored(place, image)):
        pass
