# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system whose server need not answer: what any user may hand to a daemon in an open file.

The protocol is that of <linux/fuse.h>, as much of it as one file takes. Needs root.
"""

import contextlib
import errno
import os
import select
import stat
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from ckptd.kernel.fuse import connections

FORGET, GETATTR, OPEN, READ, WRITE, RELEASE, FLUSH, INIT, IOCTL = 2, 3, 14, 15, 16, 18, 25, 26, 39
LOOKUP, READLINK, INTERRUPT, BATCH_FORGET = 1, 5, 36, 42
SILENT: Final = (FORGET, INTERRUPT, BATCH_FORGET)      # nobody waits for an answer
FUSECTL: Final = '/sys/fs/fuse/connections'
DIRECT_IO: Final = 1
ROOT, FILE = 1, 2       # nodes
IN, OUT = struct.Struct('<IIQQIIIHH'), struct.Struct('<IiQ')
REQUEST: Final = 1 << 20


class HangingFile:
    """`path` is a file whose reads give zeros and whose writes are swallowed. hangs(opcode, process id): whether that
    request of a process is not answered before `release`."""

    def __init__(self, directory: Path, hangs: Callable[[int, int], bool]) -> None:
        self._directory, self._hangs = directory, hangs
        self.path = directory / 'file'
        self.held: list[tuple[int, int]] = []       # (opcode, unique number)
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._stop, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._serve, name='fuse')

    def __enter__(self) -> Self:
        self._device = os.open('/dev/fuse', os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._directory.mkdir()
        options = f'fd={self._device},rootmode=40755,user_id=0,group_id=0,allow_other'
        subprocess.run(['mount', '-i', '-t', 'fuse', '-o', options, 'ckptd-test', self._directory], check=True,
                       pass_fds=[self._device])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Whoever waits hears ENOTCONN."""
        os.close(self._wake)
        subprocess.run(['umount', '-l', self._directory], check=True)
        self._thread.join()
        os.close(self._stop)
        os.close(self._device)

    def wait_held(self, opcode: int, count: int = 1) -> None:
        """Until so many requests of this kind wait for an answer."""
        with self._more:
            done = self._more.wait_for(lambda: sum(code == opcode for code, _ in self.held) >= count, 30)
        assert done, f'{self.held} wait, not {count} of {opcode}'

    def release(self) -> None:
        """Answer all that wait, and from now on everybody."""
        with self._lock:
            self._hangs = lambda opcode, pid: False
            held, self.held = self.held, []
        for opcode, unique in held:
            self._answer(unique, *self._reply(opcode, FILE, b''))

    def _serve(self) -> None:
        poll = select.poll()
        for fd in (self._device, self._stop):
            poll.register(fd, select.POLLIN)
        while self._stop not in dict(poll.poll()):
            with contextlib.suppress(BlockingIOError, InterruptedError):
                try:
                    request = os.read(self._device, REQUEST)
                except OSError as error:
                    if error.errno != errno.ENODEV:     # the connection was aborted
                        raise
                    return
                _, opcode, unique, node, _, _, pid, *_ = IN.unpack_from(request)
                with self._more:
                    if held := self._hangs(opcode, process_of(pid)):
                        self.held.append((opcode, unique))
                        self._more.notify_all()
                if opcode not in SILENT and not held:
                    self._answer(unique, *self._reply(opcode, node, request[IN.size:]))

    def _answer(self, unique: int, error: int, body: bytes = b'') -> None:
        with contextlib.suppress(FileNotFoundError):    # it was interrupted
            os.write(self._device, OUT.pack(OUT.size + len(body), -error, unique) + body)

    def _reply(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        match opcode:
            case 26:    # INIT
                return 0, struct.pack('<IIIIHHIIHHI28x', 7, 31, 1 << 16, 0, 16, 12, 1 << 16, 1, 0, 0, 0)
            case 1:     # LOOKUP
                return (0, struct.pack('<QQQQII', FILE, 1, 0, 0, 0, 0) + attributes(FILE)) if body == b'file\0' else (
                    errno.ENOENT, b'')
            case 3:     # GETATTR
                return 0, struct.pack('<QII', 0, 0, 0) + attributes(node)
            case 14:    # OPEN
                return 0, struct.pack('<QII', 0, DIRECT_IO, 0)
            case 15:    # READ
                return 0, bytes(struct.unpack_from('<QQI', body)[2] if body else 0)
            case 16:    # WRITE
                return 0, struct.pack('<II', struct.unpack_from('<QQI', body)[2] if body else 0, 0)
            case 18 | 25:       # RELEASE, FLUSH
                return 0, b''
        return errno.ENOSYS, b''


def fusectl() -> Path:
    """Where it is mounted: by systemd, and by us where there is none. It stays, as another test may have it in use."""
    if connections() is None:
        subprocess.run(['mount', '-t', 'fusectl', 'none', FUSECTL], check=False)        # or another test is faster
    found = connections()
    assert found is not None
    return found


def attributes(node: int, mode: int = stat.S_IFREG | 0o666) -> bytes:
    """struct fuse_attr. mode: of what is not the root directory."""
    mode = stat.S_IFDIR | 0o755 if node == ROOT else mode
    return struct.pack('<QQQQQQIIIIIIIIII', node, 1 << 40, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def process_of(tid: int) -> int:
    """Of a thread, which is what a request has."""
    try:
        text = Path(f'/proc/{tid}/status').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.partition('Tgid:')[2].split()[0])


class FickleLink(HangingFile):
    """`path` is a symbolic link that leads to where `lead` says, asked each time that somebody follows it: what a path
    leads to may change from one system call to the next, and no race has to be won for that."""

    def __init__(self, directory: Path, lead: Callable[[], Path]) -> None:
        super().__init__(directory, lambda opcode, process: False)
        self._lead = lead

    def _reply(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        if opcode == READLINK:
            return 0, bytes(self._lead())
        error, reply = super()._reply(opcode, node, body)
        if opcode in (LOOKUP, GETATTR) and not error and (opcode == LOOKUP or node == FILE):
            return 0, reply.replace(attributes(FILE), attributes(FILE, stat.S_IFLNK | 0o777))
        return error, reply
