# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that has its own tree checkpointed: CheckpointSelf, and the helper of ckptd.client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.client import checkpoint_self
from ckptd.errors import Unavailable
from ckptd.image import records
from ckptd.image.reader import ImageReader
from ckptd.image.verify import verify
from ckptd.objects.files.unix.socket import UnixSocketEnd
from tests.lib import settled
from tests.lib.bus import ROOT, PrivateBus
from tests.lib.victim import kill_session

pytestmark = pytest.mark.needs('root', 'cgroup2', 'ptrace', 'dbus')

# says what came of it; what it knew before it knows afterwards
PROGRAM = """
import os, sys, threading
from ckptd.client import checkpoint_self
from ckptd.errors import CkptError
{before}
numbers, pid, parent = list(range(100_000)), os.getpid(), os.getppid()
fds = os.listdir('/proc/self/fd')
try:
    print(checkpoint_self(sys.argv[1]{options}), flush=True)
except CkptError as error:
    print(error.name, *(row.resource for row in error.refusals), flush=True)
assert os.listdir('/proc/self/fd') == fds
assert sum(numbers) == 4999950000
assert os.getpid() == pid
{after}
"""
# a child on a pipe and a thread that waits
CHILD = """
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.close(writer)
    os._exit(0 if os.read(reader, 9) == b'the end' else 1)
os.close(reader)
go = threading.Event()
thread = threading.Thread(target=go.wait)
thread.start()
"""
CHILD_ENDS = """
go.set()
thread.join()
os.write(writer, b'the end')
assert os.waitpid(child, 0) == (child, 0)
"""
Start = Callable[..., 'subprocess.Popen[bytes]']


@pytest.fixture
def start(private_bus: PrivateBus, on_bus: 'subprocess.Popen[bytes]', tmp_path: Path) -> Iterator[Start]:
    """Start the program: start(options=', after="kill"', before='...', after='...'). Its output is in a file."""
    running: list[subprocess.Popen[bytes]] = []

    def run(options: str = '', before: str = '', after: str = '') -> 'subprocess.Popen[bytes]':
        (tmp_path / 'program.py').write_text(PROGRAM.format(options=options, before=before, after=after))
        with (tmp_path / 'output').open('ab') as output:
            running.append(subprocess.Popen(
                [sys.executable, 'program.py', private_bus.address], cwd=tmp_path, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, env={**os.environ, 'PYTHONPATH': str(ROOT)}))
        return running[-1]

    yield run
    for process in running:
        kill_session(process.pid)
        process.wait()


def the_image(tmp_path: Path) -> Path:
    [path] = [path for path in (tmp_path / 'spool').iterdir() if path.is_dir()]
    assert verify(path) == []
    return path


def severed(image: Path) -> list[records.SavedFile]:
    with ImageReader(image) as reader:
        return [file for file in reader.every(records.SavedFile) if file.kind == 'unix']


def test_the_tree_goes_on(start: Start, tmp_path: Path) -> None:
    process = start(before=CHILD, after=CHILD_ENDS)
    assert process.wait(30) == 0, (tmp_path / 'output').read_text()
    assert (tmp_path / 'output').read_text() == 'checkpointed\n'
    image = the_image(tmp_path)
    [file] = severed(image)
    assert UnixSocketEnd.decode(file.data).queue == ()
    manifest = json.loads((image / 'manifest.json').read_text())
    assert (manifest['root'], manifest['processes'], manifest['tasks']) == (process.pid, 2, 3)
    assert [row['reason'] for row in manifest['warnings']] == [f'{file.link} is a connection to the bus']


def test_a_tree_that_is_killed_when_it_is_safe(start: Start, tmp_path: Path) -> None:
    process = start(options=', after="kill"')
    assert process.wait(30) == -signal.SIGKILL
    assert (tmp_path / 'output').read_text() == ''
    assert len(severed(the_image(tmp_path))) == 1


def test_only_the_connection_to_the_bus_is_severed(start: Start, tmp_path: Path) -> None:
    """Any other socket is refused as ever, and leaves the bus connection as it is."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        process = start(before=f'import socket; client = socket.create_connection({server.getsockname()!r}); '
                        'pair = socket.socketpair()', after='assert client.fileno() == 3')
        assert process.wait(30) == 0, (tmp_path / 'output').read_text()
    name, *resources = (tmp_path / 'output').read_text().split()
    assert name == 'Refused'
    assert ' '.join(resources) == 'fd 3'
    assert list((tmp_path / 'spool').iterdir()) == []


def test_options_are_those_of_a_checkpoint(start: Start, tmp_path: Path) -> None:
    assert start(options=', handle_token="x"').wait(30) == 0
    assert start(options=', timeout=10_000_000, freeze="ptrace"').wait(30) == 0
    assert (tmp_path / 'output').read_text() == 'InvalidArgument\ncheckpointed\n'
    assert json.loads((the_image(tmp_path) / 'manifest.json').read_text())['freeze_mode'] == 'ptrace'


WAITS = """
import socket
from ckptd.client.itself import _connect
connection = _connect(sys.argv[1])
print('connected', flush=True)
os.read(0, 1)
"""


def test_nobody_else_severs_it(private_bus: PrivateBus, on_bus: 'subprocess.Popen[bytes]', tmp_path: Path) -> None:
    """A checkpoint that a program did not ask for itself is not one that it expects to lose its connection by."""
    program = 'import os, sys\n' + WAITS
    with subprocess.Popen([sys.executable, '-c', program, private_bus.address], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b'connected\n'
        done = subprocess.run(['busctl', f'--address={private_bus.address}', '--json=short', 'call', 'org.ckptd1',
                               '/org/ckptd1', 'org.ckptd1.Manager', 'Check', 'sa{sv}', f'pid:{process.pid}', '0'],
                              capture_output=True, text=True, check=True)
        [rows] = json.loads(done.stdout)['data']
        [reason] = [row['reason']['data'] for row in rows if row['severity']['data'] == 'refusal']
        assert f'connected to {private_bus.address.removeprefix("unix:path=").split(",")[0]}' in reason
        process.stdin.close()
        assert process.wait(10) == 0


# ---------------------------------------------------------------- restored

def test_restored_from_it(start: Start, private_bus: PrivateBus, tmp_path: Path) -> None:
    """The other return: the same memory, child and thread, on no bus any more; and again from the same image."""
    process = start(options=', after="kill"', before=CHILD, after=CHILD_ENDS)
    assert process.wait(30) == -signal.SIGKILL
    settled.reap_orphans()      # the child, whose pid is to be free
    image = the_image(tmp_path).name
    for times in (1, 2):
        (tmp_path / 'output').write_text('')
        done = subprocess.run([sys.executable, '-m', 'ckptd.cli', 'restore', image, '--wait', '--changed-files',
                               'accept', '--address', private_bus.address], capture_output=True, text=True, cwd=ROOT,
                              timeout=60, check=False)
        assert done.returncode == 0, f'time {times}: {done.stderr}{(tmp_path / "output").read_text()}'
        assert (tmp_path / 'output').read_text() == 'restored\n'


# ---------------------------------------------------------------- the helper by itself

def test_no_bus(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match='cannot connect'):
        checkpoint_self(f'unix:path={tmp_path}/none')
    with pytest.raises(Unavailable, match='no unix socket'):
        checkpoint_self('tcp:host=localhost,port=1')


def test_no_daemon_on_the_bus(private_bus: PrivateBus) -> None:
    with pytest.raises(Unavailable, match=r'org\.ckptd1'):
        checkpoint_self(private_bus.address)


@contextlib.contextmanager
def served(path: Path, *said: bytes) -> Iterator[str]:
    """The address of a bus that answers each piece that it reads with one of these, then hangs up."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            with server.accept()[0] as connection:
                for answer in said:
                    connection.recv(4096)
                    connection.sendall(answer)
                connection.recv(4096)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f'unix:path={path}'
        finally:
            thread.join()


def test_a_bus_that_goes_away(tmp_path: Path) -> None:
    """Who was not restored is told that the bus is gone."""
    with served(tmp_path / 'bus', b'OK 1234\r\n') as address, pytest.raises(Unavailable, match='the bus is gone'):
        checkpoint_self(address)


def test_a_bus_that_does_not_know_us(tmp_path: Path) -> None:
    with served(tmp_path / 'bus', b'REJECTED EXTERNAL\r\n') as address, pytest.raises(Unavailable, match='REJECTED'):
        checkpoint_self(address)
