# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process that starts workers, so that the daemon never forks. The daemon starts it at its beginning as

    python -m ckptd.worker.spawner FD [PIDFD]       FD: its end of a SOCK_SEQPACKET socketpair; PIDFD: of a thread of
                                                    the daemon (ckptd.kernel.liveness), as its files may outlive it

A fork copies every open file, execve(2) closes the copies, and a close may wait for the file system. With a client's
file open that never answers, the daemon would wait in fork for ever. This process has no client's files. It has loaded
all modules of a worker, so a worker starts in some milliseconds. It ends when the daemon does.

    daemon                        spawner
    Spawn, the worker's socket -> fork
                               <- Spawned, a pidfd
                               <- Exited       when it has ended in any way
"""

import contextlib
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from types import FrameType

import msgspec

from ckptd.kernel import netlink
from ckptd.protocol.messages import MAX_SPAWN, Exited, FromSpawner, Spawned, SpawnWorker
from ckptd.worker.main import main as work

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SpawnWorker).decode


class Spawner:
    def __init__(self, sock: socket.socket, daemon: int = -1) -> None:
        self._socket, self._daemon = sock, daemon
        self._children: dict[int, tuple[int, int]] = {}     # pidfd -> (number, pid)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        if daemon >= 0:
            self._poll.register(daemon, select.POLLIN)

    def serve(self) -> None:
        """Serve until the daemon has closed its end or is dead."""
        while self._daemon not in (ready := dict(self._poll.poll())):
            for fd in ready:
                if fd != self._socket.fileno():
                    self._reap(fd)
                elif not self._answer():
                    return

    def _answer(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._socket, MAX_SPAWN, 1)
        if not data:
            return False
        with socket.socket(fileno=fds[0]) as theirs:
            wish = _decode(data)
            try:
                pid = self._run(wish, theirs) if wish.command else self._fork(theirs.fileno())
            except OSError as error:
                self._say(Spawned(wish.number, 0, error.errno or 0))
                return True
        pidfd = os.pidfd_open(pid)      # the pid stays the child's until it is waited for
        self._children[pidfd] = wish.number, pid
        self._poll.register(pidfd, select.POLLIN)
        self._say(Spawned(wish.number, pid), pidfd)
        return True

    def _fork(self, theirs: int) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.setsid()         # so that a terminal's Ctrl-C reaches the daemon only
            for fd in (self._socket.fileno(), self._daemon, *self._children):
                if fd >= 0:
                    os.close(fd)
            status = work(theirs)
        except BaseException:   # noqa: BLE001 - the end of the process
            traceback.print_exc()
        finally:
            os._exit(status)

    @staticmethod
    def _run(wish: SpawnWorker, theirs: socket.socket) -> int:
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [*wish.command, str(theirs.fileno())], pass_fds=(theirs.fileno(),), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=dict(wish.environment))
        process.returncode = 0      # it is waited for here, not by subprocess
        return process.pid

    def _reap(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.close(pidfd)
        number, pid = self._children.pop(pidfd)
        self._say(Exited(number, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))

    def _say(self, message: FromSpawner, *fds: int) -> None:
        # without a daemon the next read fails
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._socket, [_encode(message)], fds)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Ignore a signal. Unlike SIG_IGN, a program that is started does not inherit this."""


def main() -> int:
    # A stop of the daemon signals everything in its cgroup or session, but workers are needed until its end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    netlink.load()
    gc.freeze()         # objects that exist now stay, so the garbage collector does not cause copies of their pages
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        daemon = int(sys.argv[2]) if len(sys.argv) > 2 else -1
        for fd in (sock.fileno(), daemon):
            if fd >= 0:
                os.set_inheritable(fd, False)
        Spawner(sock, daemon).serve()
    return 0


if __name__ == '__main__':
    sys.exit(main())
