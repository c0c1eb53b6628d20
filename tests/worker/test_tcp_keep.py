# SPDX-License-Identifier: LGPL-2.1-or-later
"""TCP connections to the outside that a restart goes on with, over a veth into a namespace of the test's own."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from msgspec import structs

from ckptd.image.ids import new_image_id
from ckptd.image.manifest import NAME, encode_manifest, read_manifest
from ckptd.journal.recover import recover
from ckptd.journal.store import Journal
from ckptd.kernel.nftables import TcpEnds, drop_connections, remove_table, tables
from ckptd.kernel.sockopt import SO_MAX_PACING_RATE
from ckptd.kernel.tcp import TCP_REPAIR
from ckptd.kernel.timens import setns
from ckptd.objects.files.tcp import keep
from tests.lib import settled
from tests.lib.altered import copy, write_file
from tests.lib.network import CLONE_NEWNET, own_network
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place
from tests.worker.test_inet_sockets import sockets_of

pytestmark = [pytest.mark.needs('root', 'ptrace', 'ip', 'unshare'), pytest.mark.timeout(120)]

OURS, THEIRS = {socket.AF_INET: '10.77.0.1', socket.AF_INET6: 'fd77::1'}, {
    socket.AF_INET: '10.77.0.2', socket.AF_INET6: 'fd77::2'}
PORT = 7070
# counts what it is asked
SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 7070), family=int(sys.argv[2])) as server:
    connection, _ = server.accept()
count = 0
try:
    while connection.recv(5, socket.MSG_WAITALL):
        count += 1
        connection.sendall(b'%05d' % count + b'x' * 20000)
except ConnectionResetError:
    sys.exit(7)
"""
# asks until there is a file `stop`; the last line of its output is the longest wait
CLIENT = """
import os, socket, sys, time
longest, count = 0.0, 0
with socket.create_connection((sys.argv[1], 7070)) as sock:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while not os.path.exists('stop'):
        begun = time.monotonic()
        sock.sendall(b'%05d' % count)
        answer = sock.recv(20005, socket.MSG_WAITALL)
        count += 1
        assert answer == b'%05d' % count + b'x' * 20000, answer[:20]
        longest = max(longest, time.monotonic() - begun)
        with open('count.new', 'w') as file:
            file.write(str(count))
        os.rename('count.new', 'count')
        time.sleep(0.002)
print(longest)
"""


def ip(*words: str) -> None:
    subprocess.run(['ip', *words], check=True)


@pytest.fixture
def other_net() -> Iterator[int]:
    """A process in a network namespace that a veth joins to a new one of ours."""
    with contextlib.ExitStack() as stack:
        neighbour = subprocess.Popen(['unshare', '-n', 'sh', '-c', 'echo; exec sleep 1000'], stdout=subprocess.PIPE)
        stack.callback(neighbour.wait)
        stack.callback(neighbour.kill)
        assert neighbour.stdout
        with neighbour.stdout as ready:
            assert ready.readline()
        stack.enter_context(own_network())
        ip('link', 'add', 'ours', 'type', 'veth', 'peer', 'name', 'theirs', 'netns', str(neighbour.pid))
        there = ('nsenter', '-t', str(neighbour.pid), '-n')
        for hosts, name, inside in ((OURS, 'ours', ()), (THEIRS, 'theirs', there)):
            for host in hosts.values():
                length = '64' if ':' in host else '24'
                nodad = ['nodad'] if ':' in host else []
                subprocess.run([*inside, 'ip', 'address', 'add', f'{host}/{length}', 'dev', name, *nodad], check=True)
            subprocess.run([*inside, 'ip', 'link', 'set', name, 'up'], check=True)
        yield neighbour.pid


class Talk:
    """A server in our namespace and a client of it in the other one."""

    def __init__(self, server: 'subprocess.Popen[bytes]', client: 'subprocess.Popen[str]', directory: Path) -> None:
        self.server, self.client, self._directory = server, client, directory

    @property
    def count(self) -> int:
        path = self._directory / 'count'
        return int(path.read_text()) if path.exists() else 0

    def goes_on(self, rounds: int = 20) -> None:
        wanted, deadline = self.count + rounds, time.monotonic() + 30
        while self.count < wanted:
            assert self.client.poll() is None, 'the client has ended'
            assert time.monotonic() < deadline, f'{self.count} rounds, not {wanted}'
            time.sleep(0.01)

    def finish(self) -> float:
        """The longest pause that the client has seen, without an error."""
        (self._directory / 'stop').touch()
        output, _ = self.client.communicate(timeout=30)
        assert self.client.returncode == 0
        return float(output)


@contextmanager
def talking(other_net: int, family: int, directory: Path) -> Iterator[Talk]:
    server = subprocess.Popen([sys.executable, '-I', '-c', SERVER, OURS[family], str(int(family))], cwd=directory,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True)
    client: subprocess.Popen[str] | None = None
    try:
        while f':{PORT} ' not in subprocess.check_output(['ss', '-Hltn'], text=True):
            time.sleep(0.01)
        client = subprocess.Popen(['nsenter', '-t', str(other_net), '-n', sys.executable, '-I', '-c', CLIENT,
                                   OURS[family]], cwd=directory, stdout=subprocess.PIPE, text=True)
        talk = Talk(server, client, directory)
        talk.goes_on()
        yield talk
    finally:
        for process in (server, client):
            if process is not None:
                process.kill()
                process.wait()
                if process.stdout:
                    process.stdout.close()


# what ss(8) counts and measures, and the names of the socket
COUNTED = {
    'ato', 'rto', 'rtt', 'rcv_rtt', 'minrtt', 'rcvmss', 'cwnd', 'ssthresh', 'bytes_sent', 'bytes_acked',
    'bytes_received', 'bytes_retrans', 'segs_out', 'segs_in', 'data_segs_out', 'data_segs_in', 'lastsnd',
    'lastrcv', 'lastack', 'delivered', 'app_limited', 'busy', 'rwnd_limited', 'sndbuf_limited', 'unacked',
    'retrans', 'lost', 'sacked', 'dsack_dups', 'reordering', 'reord_seen', 'rcv_ooopack', 'rcv_ssthresh',
    'snd_wnd', 'rcv_wnd', 'notsent', 'backoff', 'ino', 'sk', 'timer'}
RATES = ('send', 'delivery_rate')       # a word, and its value
QUEUED = re.compile(r'(?<=[(,])[rtfwo]\d+,?|,bl\d+,d\d+')     # numbers of skmem, but for the sizes of both buffers


def shown(family: int) -> list[str]:
    """All that ss(8) says of the connection, but for what it counts and measures."""
    host = f'[{OURS[family]}]' if family == socket.AF_INET6 else OURS[family]
    return shown_by_ss(f'src {host}:{PORT}')


def shown_by_ss(which: str) -> list[str]:
    """The same of the connection that a filter of ss(8) finds."""
    text = subprocess.check_output(['ss', '-Htionme', 'state', 'established', which], text=True)
    _, _, *words = QUEUED.sub('', text).split()        # without both queues
    return [word for before, word in pairwise(['', *words])
            if word.split(':')[0] not in COUNTED and not {word, before} & set(RATES)]


def restore(place: Place, image: Path, pid: int) -> 'Callable[[], int]':
    """Restore the server: kill it and return its exit status."""
    with DirectWorker() as worker:
        worker.run(place.request(0, operation='restore', image=image.name))

    def end() -> int:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return end


@pytest.fixture
def place(tmp_path: Path) -> Place:
    settled.become_subreaper()
    return Place(tmp_path).make()


TCP, SOL = socket.IPPROTO_TCP, socket.SOL_SOCKET
SET: list[tuple[int, int, int | bytes]] = [
    (TCP, socket.TCP_CONGESTION, b'reno'), (TCP, socket.TCP_NODELAY, 1), (TCP, socket.TCP_USER_TIMEOUT, 30_000),
    (TCP, socket.TCP_NOTSENT_LOWAT, 4096), (SOL, SO_MAX_PACING_RATE, 10_000_000), (SOL, socket.SO_KEEPALIVE, 1),
    (SOL, socket.SO_SNDBUF, 60_000), (SOL, socket.SO_RCVBUF, 70_000)]


@pytest.mark.parametrize('family', OURS, ids=['IPv4', 'IPv6'])
def test_a_client_sees_a_pause(other_net: int, place: Place, tmp_path: Path, family: int) -> None:
    with talking(other_net, family, tmp_path) as talk:
        with sockets_of(talk.server.pid) as found:
            [one] = found.values()
            for level, name, value in SET:
                one.setsockopt(level, name, value)
        before = shown(family)
        assert {'ts', 'sack', 'reno', 'pacing_rate'} <= set(before)
        assert [word for word in before if word.startswith('advmss:')]
        image = place.checkpoint(talk.server.pid, after='kill', external=['any:keep'])
        talk.server.wait()
        assert [name for name in tables() if name.startswith('ckptd-')]
        count, begun = talk.count, time.monotonic()
        while time.monotonic() < begun + 1:         # the client sends its request again and again
            time.sleep(0.05)
        assert talk.count <= count + 1
        end = restore(place, image, talk.server.pid)
        try:
            assert tables() == []
            talk.goes_on()
            # a duplicate of what the client has sent again takes 12 bytes of the next segment (DSACK)
            deadline = time.monotonic() + 5
            while (now := shown(family)) != before and time.monotonic() < deadline:
                talk.goes_on()
            assert now == before
            again = place.checkpoint(talk.server.pid, after='kill', external=['any:keep'])
            assert end() == -signal.SIGKILL
            end = restore(place, again, talk.server.pid)
            talk.goes_on()
            assert talk.finish() > 1
        finally:
            end()


# a server that has one client, and shuts down if it is told to. After SIGUSR1 it reads to the end, and answers
HALF = """
import signal, socket, sys
with socket.create_server((sys.argv[1], 7070), family=int(sys.argv[2])) as server:
    print('listening', flush=True)
    end, _ = server.accept()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
print('ready', flush=True)
if signal.sigwait([signal.SIGUSR1, signal.SIGUSR2]) == signal.SIGUSR2:
    end.sendall(b'last')
    end.shutdown(socket.SHUT_WR)
    print('shut', flush=True)
    signal.sigwait([signal.SIGUSR1])
data = b''
while piece := end.recv(1000):
    data += piece
assert data in (b'request', b'requestlate'), data
try:
    end.sendall(b'answer')
except BrokenPipeError:
    pass
sys.exit(7)
"""
# how the connection is being closed when the tree is killed: the client or the server has shut down; the FIN of the
# server got lost
CLOSING = {'close-wait': ('client',), 'fin-wait-2': ('server',), 'fin-wait-1': ('server', 'lost'),
           'last-ack': ('client', 'server', 'lost')}
LOSS = 'ckptd-test-loss'        # a table of nftables


def socket_in(net: int, family: int) -> socket.socket:
    """A socket of the network namespace of a process."""
    with Path('/proc/self/ns/net').open() as ours, Path(f'/proc/{net}/ns/net').open() as theirs:
        setns(theirs.fileno(), CLONE_NEWNET)
        try:
            return socket.socket(family)
        finally:
            setns(ours.fileno(), CLONE_NEWNET)


def wait_for_state(state: str) -> None:
    """Wait until ss(8) shows our end of the connection in a state."""
    deadline = time.monotonic() + 10
    while not subprocess.check_output(['ss', '-Htn', 'state', state, f'( sport = :{PORT} )']):
        assert time.monotonic() < deadline, subprocess.check_output(['ss', '-tan'], text=True)
        time.sleep(0.01)


@contextmanager
def half_closed(other_net: int, family: int, state: str) -> 'Iterator[tuple[subprocess.Popen[bytes], socket.socket]]':
    """A server and its client, whose connection is in this state."""
    server = subprocess.Popen([sys.executable, '-I', '-c', HALF, OURS[family], str(int(family))],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              start_new_session=True)
    with server, socket_in(other_net, family) as client:
        try:
            assert server.stdout
            assert server.stdout.readline() == b'listening\n'
            client.settimeout(20)
            client.connect((OURS[family], PORT))
            assert server.stdout.readline() == b'ready\n'
            client.sendall(b'request')
            if 'client' in CLOSING[state]:
                client.shutdown(socket.SHUT_WR)
                wait_for_state('close-wait')
            if 'lost' in CLOSING[state]:
                drop_connections(LOSS, [TcpEnds((OURS[family], PORT), client.getsockname()[:2])], 60_000)
            if 'server' in CLOSING[state]:
                server.send_signal(signal.SIGUSR2)
                assert server.stdout.readline() == b'shut\n'
            wait_for_state(state)
            yield server, client
        finally:
            remove_table(LOSS)
            server.kill()


@pytest.mark.parametrize(('family', 'state'), [(socket.AF_INET, state) for state in CLOSING] + [
    (socket.AF_INET6, 'last-ack')])
def test_one_that_is_being_closed(other_net: int, place: Place, family: int, state: str) -> None:
    """Both ends get what was on its way, and the end of it."""
    with half_closed(other_net, family, state) as (server, client):
        image = place.checkpoint(server.pid, after='kill', external=['any:keep'])
        server.wait()
        remove_table(LOSS)
        restore(place, image, server.pid)
        assert tables() == []
        if 'server' in CLOSING[state]:
            assert [client.recv(100), client.recv(100)] == [b'last', b'']
        if 'client' not in CLOSING[state]:
            wait_for_state('fin-wait-2')
            client.sendall(b'late')
            client.shutdown(socket.SHUT_WR)
        os.kill(server.pid, signal.SIGUSR1)
        if 'server' not in CLOSING[state]:
            assert [client.recv(100), client.recv(100)] == [b'answer', b'']
        assert os.waitstatus_to_exitcode(os.waitpid(server.pid, 0)[1]) == 7


def test_after_the_deadline_it_is_reset(other_net: int, place: Place, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, 'PATIENCE', 1)
    with talking(other_net, socket.AF_INET, tmp_path) as talk:
        image = place.checkpoint(talk.server.pid, forked=True, after='kill', external=[f'tcp:{THEIRS[socket.AF_INET]}:'
                                 f'{peer_port()}:keep'])
        talk.server.wait()
        deadline = time.monotonic() + 1.5           # of the kernel; the margin of a restart is longer
        while time.monotonic() < deadline:
            time.sleep(0.05)
        with DirectWorker() as worker:
            result = worker.run(place.request(0, operation='check-restore', image=image.name))
        assert [row for row in result['refusals'] if 'was kept for' in row['reason'] and row['severity'] == 'warning']
        restore(place, image, talk.server.pid)
        assert os.waitstatus_to_exitcode(os.waitpid(talk.server.pid, 0)[1]) == 7
        assert tables() == []


def test_the_removal_of_an_image_removes_its_filter(other_net: int, place: Place, tmp_path: Path) -> None:
    """If root has made the image: another user's does not say what root removes."""
    def forget(image: Path) -> None:
        with DirectWorker() as worker:
            worker.run(place.request(0, operation='remove-names', image=image.name))

    with talking(other_net, socket.AF_INET, tmp_path) as talk:
        image = place.checkpoint(talk.server.pid, after='kill', external=['any:keep'])
        talk.server.wait()
        assert read_manifest(image).names == 1
        held = tables()
        foreign = copy(image, place.spool / new_image_id('foreign'))
        write_file(foreign / NAME, encode_manifest(structs.replace(read_manifest(foreign), owner_uid=ORDINARY_UID)))
        forget(foreign)
        assert tables() == held != []
        forget(image)
        assert tables() == []


def peer_port() -> int:
    text = subprocess.check_output(['ss', '-Htn', 'state', 'established', f'( sport = :{PORT} )'], text=True)
    return int(text.split()[-1].rpartition(':')[2])


def test_a_checkpoint_that_goes_on_keeps_nothing(other_net: int, place: Place, tmp_path: Path) -> None:
    with talking(other_net, socket.AF_INET, tmp_path) as talk:
        place.checkpoint(talk.server.pid, external=['any:keep'])
        assert tables() == []
        talk.goes_on()
        talk.finish()


def test_a_worker_that_dies_holds_nothing(other_net: int, place: Place, tmp_path: Path) -> None:
    """Neither the packets nor the socket."""
    with talking(other_net, socket.AF_INET, tmp_path) as talk:
        with DirectWorker(env={'CKPTD_FAULT': 'taken-one=kill'}) as worker, pytest.raises(
                (AssertionError, ConnectionResetError)):
            worker.run(place.request(talk.server.pid, after='kill', external=['any:keep']))
        assert tables() != []
        recover(Journal(place.runtime))
        recover(Journal(place.runtime), files=True)
        assert tables() == []
        with sockets_of(talk.server.pid) as found:
            assert [one.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR) for one in found.values()] == [0]
        talk.goes_on()
        talk.finish()
