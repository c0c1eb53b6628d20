# SPDX-License-Identifier: LGPL-2.1-or-later
"""netlink: forks and exits as they happen (proc connector), and unix sockets with their peers (sock_diag).

pyroute2 parses the messages of sock_diag with their attributes. The sockets are plain ones, because its readers have no
timeout if a kernel does not answer. It takes 0.3 s to import, so it is imported on first use. Proc events are read
without it: a flood of them makes its reader raise, and a struct is enough to parse them.
"""

import contextlib
import errno
import functools
import importlib
import os
import select
import socket
import struct
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self

from ckptd.kernel.sockopt import SO_RCVBUFFORCE

# <linux/netlink.h>, <linux/connector.h>
NETLINK_SOCK_DIAG = 4
NETLINK_CONNECTOR = 11
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
CN_IDX_PROC = CN_VAL_PROC = 1
PROC_CN_MCAST_LISTEN, PROC_CN_MCAST_IGNORE = 1, 2     # <linux/cn_proc.h>

_HEADER = struct.Struct('=IHHII')       # struct nlmsghdr
_CONNECTOR = struct.Struct('=4I2H')     # struct cn_msg
_RECV = 1 << 16
_ANSWER_TIMEOUT = 0.05  # seconds; a kernel with an answer sends it before sendto(2) returns

# <linux/cn_proc.h>: offsets after nlmsghdr (16) and cn_msg (20)
_EVENT = struct.Struct('=I4xQ')
_EVENT_AT, _EVENT_DATA_AT = 36, 52
_EVENT_NONE, _EVENT_FORK, _EVENT_EXIT = 0, 1, 0x80000000


class TaskEvent(NamedTuple):
    """A birth or death of a task."""
    kind: Literal['fork', 'exit']
    tid: int
    tgid: int
    parent_tgid: int    # its parent process
    exit_code: int      # a wait(2) status, 0 for a fork


class ForkWatch:
    """Forks and exits of all tasks of the machine from here on, and whether any may have been missed.

    It is a hint that saves a scan and never the truth; pidfds are. The proc connector needs the first pid and network
    namespace, CONFIG_PROC_EVENTS and, before Linux 6.6, CAP_NET_ADMIN. Without it, `available` is False, `reason` says
    why and `lost` stays True. So a caller that rescans when `lost` is set needs no other fallback.
    """

    def __init__(self) -> None:
        self.available = False
        self.lost = True
        self.reason = ''
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except OSError as error:
            self.reason = str(error)
            self.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return an fd that is readable when there are events; -1 without a connector."""
        return -1 if self._socket is None else self._socket.fileno()

    def close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            # before 6.6 the kernel counts listeners by these messages and not by sockets
            with contextlib.suppress(OSError):
                sock.sendto(_control(listen=False), (0, 0))
            sock.close()
        self.available, self.lost = False, True

    def read(self) -> list[TaskEvent]:
        """Return the events that have arrived, without waiting. Any anomaly sets `lost`: the caller then reads
        /proc."""
        found: list[TaskEvent] = []
        for data in self._datagrams():
            try:
                found += _task_events(data)
            except (struct.error, ValueError, KeyError):
                self.lost = True
        return found

    def _start(self) -> None:
        self._socket = sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC,
                                            NETLINK_CONNECTOR)
        with contextlib.suppress(OSError):      # not every user may exceed the machine's limit
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
        sock.bind((0, CN_IDX_PROC))
        sock.sendto(_control(listen=True), (0, 0))
        # outside of the first namespaces the kernel ignores the request silently
        if not select.select([sock], [], [], _ANSWER_TIMEOUT)[0]:
            raise OSError(errno.EOPNOTSUPP, 'the proc connector does not answer in this namespace')
        self.lost = False
        self._acknowledged()
        sock.setblocking(False)
        self.available = True

    def _acknowledged(self) -> None:
        assert self._socket is not None
        for _ in range(1000):       # events of other tasks may have come first
            data = self._socket.recv(_RECV)
            if _EVENT.unpack_from(data, _EVENT_AT)[0] == _EVENT_NONE:
                number = struct.unpack_from('=I', data, _EVENT_DATA_AT)[0]
                if number:
                    raise OSError(number, f'proc connector: {os.strerror(number)}')
                return
        raise OSError(errno.EPROTO, 'the proc connector does not acknowledge')

    def _datagrams(self) -> Iterator[bytes]:
        while self._socket is not None:
            try:
                data, sender = self._socket.recvfrom(_RECV)
            except BlockingIOError:
                return
            except OSError:     # ENOBUFS: the kernel dropped some
                self.lost = True
                return
            if sender[0] == 0:  # only the kernel has port 0
                yield data


def _control(*, listen: bool) -> bytes:
    operation = PROC_CN_MCAST_LISTEN if listen else PROC_CN_MCAST_IGNORE
    body = _CONNECTOR.pack(CN_IDX_PROC, CN_VAL_PROC, 0, 0, 4, 0) + struct.pack('=I', operation)
    return _HEADER.pack(_HEADER.size + len(body), NLMSG_DONE, 0, 0, 0) + body


def _task_events(data: bytes) -> Iterator[TaskEvent]:
    at = 0
    while at + _HEADER.size <= len(data):
        length = _HEADER.unpack_from(data, at)[0]
        if length < _EVENT_DATA_AT:
            raise ValueError(f'netlink message of {length} bytes')
        what = _EVENT.unpack_from(data, at + _EVENT_AT)[0]
        if what == _EVENT_FORK:
            _, parent, tid, tgid = struct.unpack_from('=4I', data, at + _EVENT_DATA_AT)
            yield TaskEvent('fork', tid, tgid, parent, 0)
        elif what == _EVENT_EXIT:
            tid, tgid, code, _, _, parent = struct.unpack_from('=6I', data, at + _EVENT_DATA_AT)
            yield TaskEvent('exit', tid, tgid, parent, code)
        at += length + 3 & ~3


class UnixSocket(NamedTuple):
    """A unix socket."""
    inode: int
    type: int
    state: int
    name: bytes                          # b'' if unbound, a path, or an abstract name with its leading NUL
    peer: int                            # inode, 0 if not connected
    file: tuple[int, int, int] | None    # (major, minor, inode modulo 2**32) of the bound path
    pending: tuple[int, ...]             # inodes of connections not accepted yet
    queued: int                          # bytes in the receive queue; of a listener, the waiting connections
    unsent: int                          # bytes in the send queue; of a listener, its backlog
    shutdown: int = 0                    # RCV_SHUTDOWN and SEND_SHUTDOWN of <net/sock.h>
    has_peer: bool = False               # with peer 0: the peer is closed, or waits to be accepted


def unix_sockets() -> dict[int, UnixSocket]:
    """Return every unix socket of the caller's network namespace by inode, from sock_diag(7). OSError if it is not
    available."""
    found = [_unix_socket(message) for data in _dump_unix() for message in _unix_messages(data)]
    return {one.inode: one for one in found}


def load() -> None:
    """Import modules that are otherwise imported on first use. A process that gives up its rights may be unable to read
    their code later."""
    importlib.import_module('pyroute2.netlink.diag')


def _dump_unix() -> Iterator[bytes]:
    from pyroute2.netlink import diag
    request = diag.unix_diag_req()
    request['header'] = {'type': diag.SOCK_DIAG_BY_FAMILY, 'flags': NLM_F_REQUEST | NLM_F_DUMP, 'sequence_number': 1,
                         'pid': 0}
    request['sdiag_family'], request['udiag_states'] = socket.AF_UNIX, diag.SS_ALL
    request['udiag_show'] = (diag.UDIAG_SHOW_NAME | diag.UDIAG_SHOW_VFS | diag.UDIAG_SHOW_PEER | diag.UDIAG_SHOW_ICONS
                             | diag.UDIAG_SHOW_RQLEN)
    request.encode()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(_ANSWER_TIMEOUT)
        sock.sendto(bytes(request.data), (0, 0))
        while True:
            data = sock.recv(_RECV)
            kind = _HEADER.unpack_from(data)[1]
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                number = -struct.unpack_from('=i', data, _HEADER.size)[0]
                raise OSError(number, f'sock_diag: {os.strerror(number)}')
            yield data


@functools.cache
def _message_type() -> Any:
    from pyroute2.netlink.diag import unix_diag_msg

    class message_type(unix_diag_msg):  # type: ignore[misc]
        # names and lists as bytes: pyroute2 drops the first NUL of a name and turns lists into text
        nla_map = tuple((name, 'cdata' if name in ('UNIX_DIAG_NAME', 'UNIX_DIAG_ICONS') else kind)
                        for name, kind in unix_diag_msg.nla_map)
    return message_type


def _unix_messages(data: bytes) -> Iterator[Any]:
    """Yield pyroute2's messages of one datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if kind == NLMSG_DONE or length < _HEADER.size:
            return
        message = _message_type()(data[at:at + length])
        message.decode()
        yield message
        at += length + 3 & ~3


def _unix_socket(message: Any) -> UnixSocket:
    attribute = message.get_attr
    name, pending = attribute('UNIX_DIAG_NAME') or b'', attribute('UNIX_DIAG_ICONS') or b''
    if not name.startswith(b'\0'):
        name = name.rstrip(b'\0')       # a path comes with its terminator
    vfs, queue = attribute('UNIX_DIAG_VFS'), attribute('UNIX_DIAG_RQLEN') or {'udiag_rqueue': 0, 'udiag_wqueue': 0}
    # dev_t as in the kernel: 12 bits major, 20 bits minor
    file = (vfs['udiag_vfs_dev'] >> 20, vfs['udiag_vfs_dev'] & 0xFFFFF, vfs['udiag_vfs_ino']) if vfs else None
    return UnixSocket(message['udiag_ino'], message['udiag_type'], message['udiag_state'], name,
                      attribute('UNIX_DIAG_PEER') or 0, file, struct.unpack(f'={len(pending) // 4}I', pending),
                      queue['udiag_rqueue'], queue['udiag_wqueue'], attribute('UNIX_DIAG_SHUTDOWN') or 0,
                      attribute('UNIX_DIAG_PEER') is not None)
