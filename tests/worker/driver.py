# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker without a daemon: started as ckptd.jobs.worker starts it, or forked, for a user who cannot read the code."""

import array
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
import pyroute2.netlink.diag  # noqa: F401 - it is imported late, and then a user who cannot read the code has it not
import pytest

from ckptd.errors import CkptError, Finding, Refused
from ckptd.image.ids import new_image_id
from ckptd.jobs.interpreter import environment
from ckptd.jobs.worker import COMMAND
from ckptd.protocol.messages import MAX_MESSAGE, Failed, Finished, FromWorker, Message, Start
from ckptd.protocol.requests import Caller, Request
from ckptd.target import ProcessTarget
from ckptd.worker import main as worker_module
from tests.lib.brood import become, fork
from tests.lib.requests import make_request

ORDINARY_UID = 65534        # owns nothing; on every Linux

_decode = msgspec.msgpack.Decoder(FromWorker).decode
_encode = msgspec.msgpack.Encoder().encode


def me() -> Caller:
    """The caller that a daemon would see if this process called it."""
    mask = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('CapEff'))
    return Caller(os.geteuid(), os.getegid(), tuple(os.getgroups()), os.getpid(), int(mask.split()[1], 16))


@dataclass
class Place:
    """A spool and a runtime directory of this process's user, in a directory that everybody may enter."""
    path: Path
    images: list[Path] = field(default_factory=list)

    @property
    def spool(self) -> Path:
        return self.path / 'spool'

    @property
    def runtime(self) -> Path:
        return self.path / 'runtime'

    def make(self) -> Self:
        self.spool.mkdir(mode=0o700)
        self.runtime.mkdir(mode=0o700)
        return self

    @property
    def freezes(self) -> list[Path]:
        """Entries of the freeze journal."""
        return list((self.runtime / 'freezes').glob('*.jsonl'))

    def request(self, pid: int, operation: str = 'checkpoint', **more: Any) -> Request:
        """A request about the tree of a process, or about an image (pid 0)."""
        return make_request(operation, {
            'target': ProcessTarget(pid), 'caller': me(), 'job': 1, 'spool': str(self.spool),
            'runtime': str(self.runtime), 'image': new_image_id('test'), 'size_limit': 1 << 30}, **more)

    def checkpoint(self, pid: int, *, forked: bool = False, **more: Any) -> Path:
        """The image of a tree, made by a worker of its own."""
        with DirectWorker(forked=forked) as worker:
            result = worker.run(self.request(pid, **more))
        image = self.spool / str(result['image'])
        assert not list(self.spool.glob('.incoming-*'))
        assert not self.freezes
        self.images.append(image)
        return image


def refusals(place: Place, pid: int) -> list[Finding]:
    """What a checkpoint is refused for."""
    with pytest.raises(Refused) as caught:
        place.checkpoint(pid)
    return [row for row in caught.value.refusals if row.severity == 'refusal']


class DirectWorker:
    """`with DirectWorker() as worker: worker.run(request)`."""

    def __init__(self, *, forked: bool = False, env: dict[str, str] | None = None) -> None:
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._forked, self._env = forked, env or {}

    def __enter__(self) -> Self:
        with self._theirs as theirs:
            self.pid = self._fork(theirs) if self._forked else self._start(theirs)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._socket.close()
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            if kind and not issubclass(kind, CkptError):    # the test was given up; the worker may never end
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _start(self, theirs: socket.socket) -> int:
        process = subprocess.Popen(
            [*COMMAND, str(theirs.fileno())], pass_fds=(theirs.fileno(),), start_new_session=True,
            stdin=subprocess.DEVNULL, env={**environment(), **self._env})
        process.returncode = 0      # reaped by __exit__
        return process.pid

    def _fork(self, theirs: socket.socket) -> int:
        pid = fork()
        if pid == 0:
            status = 1
            try:
                self._socket.close()
                os.setsid()
                status = worker_module.main(theirs.detach())
            finally:
                os._exit(status)
        return pid

    def receive(self) -> Message | None:
        data = self._socket.recv(MAX_MESSAGE)
        return _decode(data) if data else None

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        self._socket.sendmsg([_encode(message)],
                             [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else [])

    def run(self, request: Request, fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """The result; raises the error that the worker reports."""
        self.send(Start(request), fds)
        return self.result()

    def result(self) -> dict[str, Any]:
        """The same of what was sent before."""
        result: dict[str, Any] = {}
        while (message := self.receive()) is not None:
            match message:
                case Failed():
                    raise message.error()
                case Finished(part, more):
                    for key, value in part.items():
                        result[key] = [*result.get(key, []), *value] if isinstance(value, list) else value
                    if not more:
                        return result
        raise AssertionError('the worker died')


@contextlib.contextmanager
def place_of(uid: int) -> Iterator[Path]:
    """A directory of that user; pytest's own can be entered by nobody else."""
    with tempfile.TemporaryDirectory(prefix='ckptd-') as name:
        path = Path(name)
        path.chmod(0o711)
        home = path / 'home'
        home.mkdir(mode=0o755)
        os.chown(home, uid, -1)
        yield home


def as_user(uid: int, home: Path, work: Callable[[], object]) -> None:
    """Do the work in a forked child that is this user and works in `home`. Its failure is ours.

    Forked and not executed: the interpreter of the checkout may be where nobody else can read it.
    """
    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(reader)
        _be_user(uid, home, work, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, said or f'the child ended with {status:#x}'


def _be_user(uid: int, home: Path, work: Callable[[], object], writer: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if uid != os.geteuid():
            become(uid)
        os.chdir(home)
        os.environ.update(HOME=str(home), PATH='/usr/bin:/bin')
        # the venv's interpreter may be a link into a home directory
        if not os.access(sys.executable, os.X_OK):
            sys.executable = '/usr/bin/python3'
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the boundary of the process: the parent is told
        os.write(writer, traceback.format_exc().encode())
    finally:
        os._exit(status)
