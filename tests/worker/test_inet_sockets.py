# SPDX-License-Identifier: LGPL-2.1-or-later
"""Internet sockets without a connection: every option, raw sockets, refusals, addresses in use, images that lie."""

import ctypes
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import CkptError
from ckptd.image.records import SavedFile
from ckptd.kernel.fdinfo import list_fds
from ckptd.kernel.inet import Address, raw_peers
from ckptd.kernel.pidfd import pidfd_getfd, pidfd_open
from ckptd.kernel.sockopt import SO_ZEROCOPY
from ckptd.objects.files.base import read_open_file
from ckptd.objects.files.inet.options import TABLE, LevelOption, Name, _fresh, _read_all
from ckptd.objects.files.inet.socket import InetAddress, MulticastGroup
from ckptd.objects.files.inet.udp import UdpSocket
from ckptd.objects.files.options import SocketOption, read_options
from ckptd.objects.files.registry import Kinds
from ckptd.objects.files.tcp.socket import TcpSocket
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.lib.brood import Brood
from tests.lib.victim import Victim
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, as_user, place_of, refusals
from tests.worker.test_restore_checks import checked

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

V4, V6, STREAM, DGRAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
UDP_CORK, CLONE_NEWNET = 1, 0x40000000
# options that the victim sets on no socket: IPV6_RTHDR needs a kernel with mobile IPv6
NOT_SET = {(socket.IPPROTO_IPV6, socket.IPV6_RTHDR)}


@contextmanager
def sockets_of(pid: int) -> Iterator[dict[int, socket.socket]]:
    """The sockets of a process, by fd."""
    with ExitStack() as stack:
        pidfd = pidfd_open(pid)
        stack.callback(os.close, pidfd)
        found = {}
        for fd in list_fds(pid):
            if Path(f'/proc/{pid}/fd/{fd}').is_socket():
                found[fd] = stack.enter_context(socket.socket(fileno=pidfd_getfd(pidfd, fd)))
        yield found


def killed(running: Victim, place: Place) -> Path:
    image = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    return image


def restored(place: Place, image: Path) -> int:
    with DirectWorker() as worker:
        return int(worker.run(place.request(0, operation='restore', image=image.name))['root'])


@contextmanager
def reaped(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_every_option_of_the_tables_comes_back(victim: Callable[..., Victim], place: Place) -> None:
    """Each option of the tables has another value than on a fresh socket, on at least one socket, and every option of
    every socket is afterwards as it was."""
    running = victim('inet_options')

    def look(pid: int) -> dict[int, dict[Name, bytes]]:
        with sockets_of(pid) as found:
            return {fd: {**_read_all(one, is_connected=False),
                         **{(socket.SOL_SOCKET, name): value for name, value in read_options(one).items()}}
                    for fd, one in found.items()}

    before, changed, unknown = look(running.pid), set[Name](), set[Name]()
    with sockets_of(running.pid) as found:
        for fd, one in found.items():
            usual = _fresh(one.family, one.type, one.proto)
            changed |= {name for name in usual if before[fd][name] != usual[name]}
        unknown = {(level, name) for level, names in TABLE.items() for name in names} - {
            name for one in found.values() for name in _fresh(one.family, one.type, one.proto)}
    every = {(level, name) for level, names in TABLE.items() for name in names}
    assert every - changed - unknown == NOT_SET
    pid = restored(place, killed(running, place))
    with reaped(pid):
        after = look(pid)
        assert [(fd, name, before[fd][name], after[fd].get(name)) for fd in before for name in before[fd]
                if before[fd][name] != after[fd].get(name)] == []


RAW_PROGRAM = '''
import signal, socket
one, other = (socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) for _ in range(2))
one.bind(('127.0.0.1', 0))
one.connect(('127.0.0.2', 0))
ping = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
ping.connect(('::1', 0))
print('ready', flush=True)
signal.pause()
'''


@contextmanager
def program(source: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that prints a line when it is ready and then waits for ever."""
    process = subprocess.Popen([sys.executable, '-c', source], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b'ready\n'
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_raw_sockets_come_back(place: Place) -> None:
    with program(RAW_PROGRAM) as running:
        with sockets_of(running.pid) as found:
            before = [(fd, one.getsockname(), one.proto) for fd, one in found.items()]
        peers = sorted(raw_peers().values())
        assert peers == [Address('127.0.0.2', 0), Address('::1', 0)]
        image = place.checkpoint(running.pid, after='kill')
        running.wait()
    pid = restored(place, image)
    with reaped(pid), sockets_of(pid) as found:
        assert [(fd, one.getsockname(), one.proto) for fd, one in found.items()] == before
        assert sorted(raw_peers().values()) == peers


# ---------------------------------------------------------------- refused

def test_a_connection_is_refused_by_its_peer(place: Place, brood: Brood) -> None:
    with socket.create_server(('127.0.0.1', 0)) as server:
        address = server.getsockname()
        pid, fd = brood.ask(lambda: (server.close(), socket.create_connection(address).detach())[1])
        [row] = refusals(place, pid)
    assert row.resource == f'fd {fd}'
    assert f'a TCP connection to 127.0.0.1:{address[1]}' in row.reason


def test_an_unfinished_datagram_is_refused(place: Place, brood: Brood) -> None:
    def cork() -> int:
        one = socket.socket(V4, DGRAM)
        one.bind(('127.0.0.1', 0))
        one.setsockopt(socket.IPPROTO_UDP, UDP_CORK, 1)
        one.sendto(b'half', one.getsockname())
        return one.detach()
    pid, fd = brood.ask(cork)
    with pytest.raises(CkptError, match=f'fd {fd}: .*unfinished datagram') as caught:
        place.checkpoint(pid)
    assert caught.value.errno == errno.EAGAIN


def test_another_network_namespace_is_refused(place: Place, brood: Brood) -> None:
    def elsewhere() -> list[int]:
        home = os.open('/proc/self/ns/net', os.O_RDONLY)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(CLONE_NEWNET) == 0
        made = [socket.socket(V4, STREAM).detach(), socket.socket(V6, DGRAM).detach()]
        assert libc.setns(home, CLONE_NEWNET) == 0
        os.close(home)
        return made
    pid, fds = brood.ask(elsewhere)
    rows = refusals(place, pid)
    assert {(row.errno, row.resource) for row in rows} == {('EXDEV', f'fd {fd}') for fd in fds}
    assert all('another network namespace' in row.reason for row in rows)


def test_keys_that_sign_are_refused(place: Place, brood: Brood) -> None:
    key = struct.pack('=H2x4s120xBBHi80s', V4, socket.inet_aton('127.0.0.1'), 0, 0, 3, 0, b'key')

    def sign() -> int:
        one = socket.socket(V4, STREAM)
        try:
            one.setsockopt(socket.IPPROTO_TCP, 14, key)     # TCP_MD5SIG
        except OSError:
            return -1
        one.bind(('127.0.0.1', 0))
        one.listen()
        return one.detach()
    pid, fd = brood.ask(sign)
    if fd < 0:
        pytest.skip('a kernel without CONFIG_TCP_MD5SIG')
    [row] = refusals(place, pid)
    assert 'TCP_MD5SIG' in row.reason


def test_keys_of_tcp_ao_are_refused(place: Place, brood: Brood) -> None:
    # struct tcp_ao_add: address, algorithm, interface, flags, reserved, prefix, ids, lengths, key
    key = struct.pack('=H2x4s120x64siIH6B80s', V4, socket.inet_aton('127.0.0.1'), b'hmac(sha1)', 0, 0, 0, 32, 1, 1, 0,
                      0, 3, b'key')

    def sign() -> int:
        one = socket.socket(V4, STREAM)
        try:
            one.setsockopt(socket.IPPROTO_TCP, 38, key)     # TCP_AO_ADD_KEY
        except OSError:
            return -1
        return one.detach()
    pid, fd = brood.ask(sign)
    if fd < 0:
        pytest.skip('a kernel without CONFIG_TCP_AO')
    [row] = refusals(place, pid)
    assert 'TCP-AO' in row.reason


def test_an_upper_layer_protocol_is_refused_by_its_name(place: Place, brood: Brood) -> None:
    def protect() -> int:
        with socket.create_server(('127.0.0.1', 0)) as server:
            one = socket.create_connection(server.getsockname())
            kept.append(server.accept()[0])
        try:
            one.setsockopt(socket.IPPROTO_TCP, 31, b'tls')      # TCP_ULP
        except OSError:
            return -1
        return one.detach()
    kept: list[socket.socket] = []
    pid, fd = brood.ask(protect)
    if fd < 0:
        pytest.skip('a kernel without CONFIG_TLS')
    [row] = refusals(place, pid)
    assert "'tls'" in row.reason


ZEROCOPY = """
import array, fcntl, select, signal, socket, termios
MSG_ZEROCOPY, left = 0x4000000, array.array('i', [1])
server = socket.create_server(('127.0.0.1', 0))
one = socket.create_connection(server.getsockname())
other, _ = server.accept()
one.setsockopt(socket.SOL_SOCKET, 60, 1)        # SO_ZEROCOPY
one.setblocking(False)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
def read_notifications():
    while True:
        try:
            one.recvmsg(1, 100, socket.MSG_ERRQUEUE)
        except BlockingIOError:
            return
def step():
    print('ready', flush=True)
    signal.sigwait([signal.SIGUSR1])
try:
    while True:
        one.send(bytes(1 << 16), MSG_ZEROCOPY)
except BlockingIOError:
    pass
while any(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)[24:]):    # some is on its way: tcpi_unacked
    pass
read_notifications()
step()
other.setblocking(False)
while left[0]:
    try:
        other.recv(1 << 20)
    except BlockingIOError:
        pass
    fcntl.ioctl(one, termios.TIOCOUTQ, left)
poll = select.poll()
poll.register(one, 0)
poll.poll()
step()
read_notifications()
step()
"""


def test_sends_without_a_copy(place: Place) -> None:
    """Refused while they are on their way or their notifications are unread; then a warning tells of their numbers."""
    with program(ZEROCOPY) as running:
        for text in ('not finished', 'unread notifications of MSG_ZEROCOPY'):
            with sockets_of(running.pid) as found:
                [fd] = [fd for fd, one in found.items() if one.getsockopt(socket.SOL_SOCKET, SO_ZEROCOPY)]
            file = read_open_file(running.pid, fd)
            [row] = Kinds().of(file).findings(file)
            assert (row.errno, row.severity) == ('EAGAIN', 'refusal')
            assert text in row.reason
            running.send_signal(signal.SIGUSR1)
            assert running.stdout
            assert running.stdout.readline() == b'ready\n'
        assert sum('uses MSG_ZEROCOPY' in reason for reason in warned(place, running.pid)) == 1


def test_unread_netlink_messages_are_refused(place: Place, brood: Brood) -> None:
    def ask() -> int:
        one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        one.send(struct.pack('=IHHII', 32, 18, 0x301, 1, 0) + bytes(16))       # RTM_GETLINK
        return one.detach()
    pid, fd = brood.ask(ask)
    with pytest.raises(CkptError, match=f'fd {fd}: .*unread messages') as caught:
        place.checkpoint(pid)
    assert caught.value.errno == errno.EAGAIN


def warned(place: Place, pid: int) -> list[str]:
    with DirectWorker() as worker:
        return [row['reason'] for row in worker.run(place.request(pid))['warnings']]


def test_what_is_lost_is_a_warning(place: Place, brood: Brood) -> None:
    """A connection that nobody accepted, a stranger's datagram, a pending error, and one row for a port of several."""
    with socket.socket(V4, STREAM) as client, socket.socket(V4, DGRAM) as stranger:
        def make() -> tuple[int, int]:
            client.close()
            stranger.close()
            server = socket.create_server(('127.0.0.1', 0))
            group = [socket.socket(V4, DGRAM) for _ in range(3)]
            for one in group:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                one.bind(('127.0.0.1', 0) if one is group[0] else group[0].getsockname())
            single = socket.socket(V4, DGRAM)
            single.bind(('127.0.0.1', 0))
            broken = socket.socket(V4, DGRAM)
            broken.connect(('127.0.0.1', 9))
            broken.send(b'to nobody')
            kept.extend([server, single, broken, *group])
            return server.getsockname()[1], single.getsockname()[1]
        kept: list[socket.socket] = []
        pid, (port, single) = brood.ask(make)
        client.connect(('127.0.0.1', port))
        stranger.sendto(b'hello', ('127.0.0.1', single))
        found = warned(place, pid)
        with sockets_of(pid) as held:       # and the queue is untouched
            [one] = [one for one in held.values() if one.getsockname()[1] == single]
            assert one.recv(10, socket.MSG_DONTWAIT) == b'hello'
    assert sum(f'1 connections to 127.0.0.1:{port} from outside of the tree wait' in text for text in found) == 1
    assert sum('1 unread datagrams' in text for text in found) == 1
    assert sum('3 sockets share UDP port' in text for text in found) == 1
    assert sum('pending error' in text for text in found) == 1


# ---------------------------------------------------------------- at the restart

@pytest.fixture
def image(victim: Callable[..., Victim], place: Place) -> Path:
    """The image of a dead tree with sockets of every sort."""
    return killed(victim('inet_sockets'), place)


def records(image: Path) -> list[TcpSocket]:
    found: list[TcpSocket] = []
    rewrite(image, SavedFile, lambda one: (found.append(TcpSocket.decode(one.data)) if one.kind == 'tcp' else None, one)
            [1])
    return found


def lie(image: Path, kind: str, change: Callable[[Any], Any]) -> None:
    cls: Any = {'tcp': TcpSocket, 'udp': UdpSocket}[kind]
    rewrite(image, SavedFile, lambda one: one if one.kind != kind else replace(
        one, data=change(cls.decode(one.data)).encode()))


def test_an_address_in_use_names_its_user(place: Place, image: Path) -> None:
    taken = next(one.socket.bound[0] for one in records(image) if one.listening and one.socket.family == V4)
    with socket.create_server((taken.host, taken.port)):
        rows = [row for row in checked(place, image) if row.severity == 'refusal']
        assert [row.errno for row in rows] == ['EADDRINUSE']
        assert f'{taken.host}:{taken.port} is in use by ' in rows[0].reason
        assert f'[{os.getpid()}]' in rows[0].reason
        with DirectWorker() as worker, pytest.raises(CkptError, match='is in use by'):
            worker.run(place.request(0, operation='restore', image=image.name))
    assert not [row for row in checked(place, image) if row.severity == 'refusal']


def test_an_address_of_a_connection_that_no_process_has_is_named(place: Place, image: Path) -> None:
    """The server end of it is closed, its client is not."""
    taken = next(one.socket.bound[0] for one in records(image) if one.listening and one.socket.family == V4)
    with socket.socket() as server:         # without SO_REUSEADDR
        server.bind((taken.host, taken.port))
        server.listen()
        client = socket.create_connection((taken.host, taken.port))
        server.accept()[0].close()
    with client:
        assert client.recv(1) == b''
        rows = [row for row in checked(place, image) if row.severity == 'refusal']
        assert [row.reason.partition(': ')[2] for row in rows] == [
            f'{taken.host}:{taken.port} is in use by a connection in fin-wait-2 that no process has any more']


LIES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    'a family': ('tcp', lambda one: replace(one, socket=replace(one.socket, family=77))),
    'a type': ('tcp', lambda one: replace(one, socket=replace(one.socket, type=0xFFFFFFFF))),
    'a protocol': ('udp', lambda one: replace(one, socket=replace(one.socket, protocol=0xFFFFFFFF))),
    'a name': ('tcp', lambda one: replace(one, socket=replace(one.socket, bound=(
        InetAddress('example.invalid', 80, 0, 0),)))),
    'a flow label': ('udp', lambda one: replace(one, socket=replace(one.socket, bound=(
        InetAddress('::1', 0, 0xFFFFFFFF, 0xFFFFFFFF),)))),
    'an option': ('tcp', lambda one: replace(one, socket=replace(one.socket, options=replace(
        one.socket.options, levels=(LevelOption(socket.IPPROTO_TCP, 19, b'\1\0\0\0'),))))),
    'a level': ('tcp', lambda one: replace(one, socket=replace(one.socket, options=replace(
        one.socket.options, levels=(LevelOption(0xFFFFFFFF, 0xFFFFFFFF, b''),))))),
    'a device': ('udp', lambda one: replace(one, socket=replace(one.socket, options=replace(
        one.socket.options, device='x' * 5000)))),
    'a group': ('udp', lambda one: replace(one, socket=replace(one.socket, groups=(
        MulticastGroup(77, 'lo', 'nonsense', 1, ('more',)),)))),
}


@pytest.mark.parametrize('what', LIES)
def test_an_image_that_lies_is_refused(place: Place, image: Path, what: str) -> None:
    kind, change = LIES[what]
    lie(image, kind, change)
    rows = [row for row in checked(place, image) if row.severity == 'refusal']
    assert rows
    with DirectWorker() as worker, pytest.raises(CkptError):
        worker.run(place.request(0, operation='restore', image=image.name))
    assert not place.freezes


def test_a_datagram_of_nobody_ends_the_restart(place: Place, image: Path) -> None:
    lie(image, 'udp', lambda one: replace(one, queue=tuple(
        replace(datagram, sender=InetAddress('127.0.0.1', 1, 0, 0)) for datagram in one.queue)))
    with DirectWorker() as worker, pytest.raises(CkptError, match='no socket of the image'):
        worker.run(place.request(0, operation='restore', image=image.name))
    assert not place.freezes


def test_a_user_gets_no_more_than_the_kernel_gives() -> None:
    """A user's image that claims a port below 1024, a mark and a raw socket, is refused for each."""
    def work() -> None:
        place = Place(Path.cwd()).make()
        with Victim('inet_sockets', directory=place.path / 'victim') as running:
            image = place.checkpoint(running.pid, forked=True, freeze='ptrace')
            low = InetAddress('127.0.0.1', 80, 0, 0)
            lie(image, 'tcp', lambda one: replace(one, socket=replace(one.socket, bound=(low,))) if one.listening else
                replace(one, socket=replace(one.socket, options=replace(one.socket.options, plain=(
                    *one.socket.options.plain, *_mark())))))
            lie(image, 'udp', lambda one: replace(one, socket=replace(one.socket, type=socket.SOCK_RAW)))
            with DirectWorker(forked=True) as worker:
                result = worker.run(place.request(0, operation='check-restore', image=image.name))
            reasons = [row['reason'] for row in result['refusals'] if row['errno'] in ('EACCES', 'EPERM')]
            for said in ('127.0.0.1:80 may not be bound by this user', 'socket option 36 cannot be set again',
                         f'type {int(socket.SOCK_RAW)} and protocol 17 cannot be made'):
                assert any(said in reason for reason in reasons), (said, reasons)
            running.finish()

    with place_of(ORDINARY_UID) as home:
        as_user(ORDINARY_UID, home, work)


def _mark() -> tuple[SocketOption, ...]:
    return (SocketOption(socket.SO_MARK, struct.pack('i', 5)),)
