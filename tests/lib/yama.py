# SPDX-License-Identifier: LGPL-2.1-or-later
"""Yama for a daemon of ours and all that it starts, on kernels without it.

    with Yama(scope=1) as yama, Served(bus, directory, spool, env=yama.environment, module=yama.module) as daemon:
        ...

This module is the program that such a daemon is started by. In a mount namespace of its own it has a
/proc/sys/kernel/yama/ptrace_scope, and then it puts itself under a seccomp filter that asks the test about each system
call for which the kernel would ask Yama (SECCOMP_RET_USER_NOTIF, seccomp_unotify(2)). The test decides by what /proc
says of both processes, as Documentation/admin-guide/LSM/Yama.rst has the rules:

    0   all as without Yama
    1   descendants, and who has declared the tracer or an ancestor of it (PR_SET_PTRACER); after PTRACE_SEIZE, its
        tracer may also read it
    2   nobody without CAP_SYS_PTRACE, and that for reading, too
    3   nobody may begin to trace

A program outside of the daemon declares its tracer with `declare_at(yama.home, pid)`.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from tests.lib.brood import libc

CAP_SYS_PTRACE = 1 << 19
# <asm/unistd_64.h>
NR_PTRACE, NR_PROCESS_VM_READV, NR_SECCOMP, NR_PIDFD_GETFD = 101, 310, 317, 438
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206            # <linux/ptrace.h>
# <linux/seccomp.h>
SET_MODE_FILTER, NEW_LISTENER = 1, 1 << 3
RET_USER_NOTIF, RET_ALLOW = 0x7FC00000, 0x7FFF0000
NOTIF_RECV, NOTIF_SEND, CONTINUE = 0xC0502100, 0xC0182101, 1
NOTIFICATION, RESPONSE = struct.Struct('QIIiIQ6Q'), struct.Struct('QqiI')
NR_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 16
# <linux/bpf_common.h>: load a word; jump if equal; return
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
EPERM = 1
SOCKET: Final = 'CKPTD_TEST_YAMA'
# a directory of /proc/sys cannot be made; what is there stays reachable through links
MOUNTS = """
mount --make-rprivate /
mkdir "$1/kernel"
mount --bind /proc/sys/kernel "$1/kernel"
mount -t tmpfs -o mode=755 none /proc/sys/kernel
for path in "$1"/kernel/*; do ln -s "$path" /proc/sys/kernel/; done
mkdir /proc/sys/kernel/yama
echo "$2" > /proc/sys/kernel/yama/ptrace_scope
"""


class Yama:
    """The rules for one daemon. asked: (capability at hand, allowed) of each question about another process."""
    module = __name__

    def __init__(self, scope: int) -> None:
        self.scope = scope
        self.asked: list[tuple[bool, bool]] = []
        self.failure: Exception | None = None
        self._declared: dict[int, int] = {}
        self._directory = tempfile.TemporaryDirectory(prefix='ckptd-yama-')
        self.home = self._directory.name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end, self._ended = os.pipe()
        self._thread = threading.Thread(target=self._decide, name='yama')

    @property
    def environment(self) -> dict[str, str]:
        return {SOCKET: f'{self.home}:{self.scope}'}

    def __enter__(self) -> Self:
        Path(self.home).chmod(0o755)
        self._socket.bind(f'{self.home}/socket')
        Path(self.home, 'socket').chmod(0o666)
        self._socket.listen()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ended)
        self._thread.join()
        os.close(self._end)
        self._socket.close()
        self._directory.cleanup()
        if self.failure is not None:
            raise self.failure

    # ------------------------------------------------------------ the thread that answers

    def _decide(self) -> None:
        listener = -1
        try:
            while True:
                asking = [listener] if listener >= 0 else []
                readable, _, _ = select.select([self._end, self._socket, *asking], [], [])
                if self._end in readable:
                    return
                if self._socket in readable:
                    listener = self._greet(listener)
                if listener in readable and not self._answer(listener):
                    os.close(listener)
                    listener = -1
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: __exit__ raises it
            self.failure = error
        finally:
            if listener >= 0:
                os.close(listener)      # who asks from now on gets ENOSYS

    def _greet(self, listener: int) -> int:
        """The listener of the daemon, once it is known."""
        theirs, _ = self._socket.accept()
        with theirs:
            message, fds, _, _ = socket.recv_fds(theirs, 100, 1)
            if fds:
                return fds[0]
            tracee, tracer = map(int, message.split())
            self._declared[tracee] = tracer
            theirs.send(b'.')
        return listener

    def _answer(self, listener: int) -> bool:
        """One question; False when nobody is left who may ask."""
        request = bytearray(NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, NOTIF_RECV, request)
        except FileNotFoundError:       # who asked is dead, or the last one of all is
            poll = select.poll()
            poll.register(listener, 0)
            return not poll.poll(0)
        number, pid, _, call, _, _, first, second, *_ = NOTIFICATION.unpack(request)
        allowed = True
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            allowed = self._may(pid, call, first, second)
        with contextlib.suppress(FileNotFoundError):    # it is dead
            fcntl.ioctl(listener, NOTIF_SEND, RESPONSE.pack(number, 0, *((0, CONTINUE) if allowed else (-EPERM, 0))))
        return True

    def _may(self, tid: int, call: int, first: int, second: int) -> bool:
        tracer, begins = status(tid), call == NR_PTRACE
        subject = {NR_PTRACE: second, NR_PROCESS_VM_READV: first}.get(call) or behind_pidfd(tid, first)
        tracee = status(subject)
        if tracee['Tgid'] == tracer['Tgid']:
            return True
        capable = bool(int(tracer['CapEff'], 16) & CAP_SYS_PTRACE)
        allowed = self._allows(int(tracer['Tgid']), tracee, capable, begins)
        self.asked.append((capable, allowed))
        return allowed

    def _allows(self, tracer: int, tracee: dict[str, str], capable: bool, begins: bool) -> bool:
        if self.scope == 1:
            leader = int(tracee['Tgid'])
            return (capable or descends(leader, tracer) or status(int(tracee['TracerPid']) or 1)['Tgid'] == str(tracer)
                    or descends(tracer, self._declared.get(leader, 0)))
        if self.scope == 2:
            return capable
        return self.scope == 0 or not begins


def declare_at(home: str, pid: int) -> bool:
    """What PR_SET_PTRACER does, for the calling process. home: of the Yama that is to know it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours:
        ours.connect(f'{home}/socket')
        ours.send(b'%d %d' % (os.getpid(), pid))
        return ours.recv(1) == b'.'


def status(tid: int) -> dict[str, str]:
    lines = Path(f'/proc/{tid}/status').read_text().splitlines()
    return dict(line.split(':\t', 1) for line in lines if ':\t' in line)


def behind_pidfd(tid: int, pidfd: int) -> int:
    """The task that a pidfd of a process refers to, -1 when that is dead."""
    lines = Path(f'/proc/{tid}/fdinfo/{pidfd}').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('Pid:'))


def descends(pid: int, ancestor: int) -> bool:
    while ancestor and pid > 1:
        if pid == ancestor:
            return True
        pid = int(status(pid)['PPid'])
    return False


# ---------------------------------------------------------------- the program

def filter_program() -> Iterator[tuple[int, int, int, int]]:
    """struct sock_filter, one each: code, steps if true, steps if false, operand."""
    yield LOAD, 0, 0, NR_OFFSET
    yield EQUAL, 5, 0, NR_PIDFD_GETFD
    yield EQUAL, 4, 0, NR_PROCESS_VM_READV
    yield EQUAL, 0, 4, NR_PTRACE
    yield LOAD, 0, 0, FIRST_ARGUMENT_OFFSET
    yield EQUAL, 1, 0, PTRACE_SEIZE
    yield EQUAL, 0, 1, PTRACE_ATTACH
    yield RETURN, 0, 0, RET_USER_NOTIF
    yield RETURN, 0, 0, RET_ALLOW


def install() -> int:
    """Put the calling process, of one thread, under the filter; the fd where its questions come."""
    code = b''.join(struct.pack('HBBI', *step) for step in filter_program())
    steps = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack('HQ', len(code) // 8, ctypes.addressof(steps)))
    listener = int(libc.syscall(NR_SECCOMP, SET_MODE_FILTER, NEW_LISTENER, program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), 'seccomp(2)')
    return listener


def main() -> None:
    home, _, scope = os.environ.pop(SOCKET).rpartition(':')
    if libc.unshare(0x20000) != 0:      # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), 'unshare(2)')
    subprocess.run(['sh', '-euc', MOUNTS, 'sh', home, scope], check=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours:
        ours.connect(f'{home}/socket')
        listener = install()
        socket.send_fds(ours, [b'daemon'], [listener])
        os.close(listener)
    os.execv(sys.executable, [sys.executable, '-m', 'ckptd.daemon', *sys.argv[1:]])


if __name__ == '__main__':
    main()
