# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TCP or MPTCP socket (tcp(7)) without a connection: fresh, bound, or listening.

A restart binds it at once and lets it listen when all files are made: connections of the tree that were accepted from
it share its port. Connections that wait to be accepted are lost.
"""

import errno
import select
import socket
from collections.abc import Iterator, Sequence

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U8, U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel import unix
from ckptd.kernel.inet import (
    STATES,
    TCP_CLOSE,
    TCP_LISTEN,
    TCP_ULP,
    has_ao_keys,
    local_address,
    peer_address,
    tcp_state,
)
from ckptd.kernel.sockopt import read_option
from ckptd.objects.files.base import Content, Endpoint, FileEnd, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.content import set_owner, socket_findings
from ckptd.objects.files.inet.socket import (
    InetSocket,
    bind_socket,
    dump_socket,
    foreign_findings,
    make_socket,
    port_endpoint,
    probe,
    require_dumpable,
    rights,
    settle,
    shared_ports,
    socket_type,
)
from ckptd.objects.files.socket_filter import filter_findings, set_filter
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.tcp.table import TcpTable
from ckptd.objects.support import Support

_PROTOCOLS = (socket.IPPROTO_TCP, socket.IPPROTO_MPTCP)
_ULP_NAME = 16      # bytes, TCP_ULP_NAME_MAX of <net/tcp.h>
_MAX_BACKLOG = (1 << 31) - 1


@layout
class TcpSocket(Struct):
    """A socket without a connection."""
    socket: InetSocket
    listening: U8
    backlog: U32        # argument of listen(2), as far as the machine allowed it


class TcpKind(Kind[TcpSocket], tag='tcp'):
    support = Support('TCP and MPTCP sockets without a connection: fresh, bound, listening',
                      refused='MPTCP connections, keys (TCP_MD5SIG, TCP-AO), upper layer protocols such as kTLS, '
                              'eBPF filters',
                      warned='connections that wait to be accepted, programs of SO_REUSEPORT groups',
                      user='ports and options that need a right are refused')

    def matches(self, file: OpenFile) -> bool:
        kind = socket_type(file, self._tables)
        if kind is None or kind.type != socket.SOCK_STREAM or kind.protocol not in _PROTOCOLS or (
                kind.family not in (socket.AF_INET, socket.AF_INET6)):
            return False
        if kind.protocol == socket.IPPROTO_MPTCP:
            return True
        with file.as_socket() as sock:
            return not is_connection(sock)

    def findings(self, file: OpenFile) -> list[Finding]:
        kind = socket_type(file, self._tables)
        if kind and (found := foreign_findings(file, kind)):
            return found
        with file.as_socket() as sock:
            return [*_state_findings(file, sock, self._tables), *feature_findings(file, sock, self._tables)]

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        kind = socket_type(file, self._tables)
        if kind is None or kind.foreign:
            return None
        with file.as_socket() as sock:
            return port_endpoint(file, sock, self.tag)

    def link(self, ends: Sequence[FileEnd], *, is_whole: bool) -> Iterator[tuple[FileEnd, Finding]]:
        return shared_ports(ends)

    def dump(self, file: OpenFile, content: Content) -> TcpSocket:
        with file.as_socket() as sock:
            require_dumpable(file, self.findings(file))
            now = tcp_state(sock)
            listening = now.state == TCP_LISTEN
            return TcpSocket(dump_socket(file, sock), listening, now.backlog if listening else 0)

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: TcpSocket, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        one = record.socket
        return [*socket_findings(saved.link, one.uid, one.gid, lookup), *probe(one, saved, lookup)]

    def create(self, record: TcpSocket, saved: SavedFile, ctx: RestoreContext) -> int:
        one = record.socket
        with rights(ctx), make_socket(one, saved.link) as sock:
            bind_socket(sock, one, saved.link)
            set_owner(sock.fileno(), saved.mode, one.uid, one.gid, ctx)
            return sock.detach()

    def connect(self, record: TcpSocket, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        with rights(ctx), socket.socket(fileno=fd) as sock:
            try:
                set_filter(sock, record.socket.filter, saved.link)
                if record.listening:
                    _listen(sock, record, saved)
                settle(sock, record.socket, saved.link)
            finally:
                sock.detach()


def _listen(sock: socket.socket, record: TcpSocket, saved: SavedFile) -> None:
    try:
        sock.listen(min(record.backlog, _MAX_BACKLOG))
    except OSError as error:
        raise CkptError(f'{saved.link}: cannot listen on {local_address(sock)}: {error.strerror}', errno=error.errno,
                        resource=saved.link, hint='stop the program that has the address') from error


def _state_findings(file: OpenFile, sock: socket.socket, tables: JobTables) -> Iterator[Finding]:
    now = tcp_state(sock)
    if now.state == TCP_LISTEN:
        own = local_address(sock)
        # another listener of the port may have some of them
        if now.waiting and (lost := min(now.waiting, TcpTable().clients_outside(own, tables.tasks or ()))):
            yield finding('ECONNABORTED', f'{lost} connections to {own} from outside of the tree wait to be accepted',
                          'a restart begins without them; their clients see a reset', 'warning')
        return
    if sock.proto == socket.IPPROTO_MPTCP and is_connection(sock):
        yield finding('EOPNOTSUPP', f'{file.link} is an MPTCP connection to {peer_address(sock)} '
                      f'({STATES.get(now.state, "unknown")}), which cannot be made again',
                      'close it before the checkpoint, or let the program use TCP')


def is_connection(sock: socket.socket) -> bool:
    """Whether a TCP socket is or was connected, or is connecting."""
    state = tcp_state(sock).state
    return state != TCP_LISTEN and (state != TCP_CLOSE or unix.polls(sock, select.POLLRDHUP) or unix.has_error(sock))


def feature_findings(file: OpenFile, sock: socket.socket, tables: JobTables) -> Iterator[Finding]:
    """Yield refusals of what nothing reads."""
    yield from filter_findings(sock, file.link)
    if (own := tables.inet_sockets(socket.IPPROTO_TCP).get(file.stat.st_ino)) and own.is_signed:
        yield finding('EOPNOTSUPP', f'{file.link} has keys that sign its packets (TCP_MD5SIG), which nothing reads',
                      'close it before the checkpoint')
    if has_ao_keys(sock):
        yield finding('EOPNOTSUPP', f'{file.link} has keys that sign its packets (TCP-AO), of which nothing reads the '
                      'secret', 'close it before the checkpoint')
    if (ulp := _ulp(sock)) and sock.proto == socket.IPPROTO_TCP:      # MPTCP is one itself
        yield finding('EOPNOTSUPP', f'{file.link} has the upper layer protocol {ulp!r} (TCP_ULP), whose state nothing '
                      'reads', 'close it before the checkpoint')


def _ulp(sock: socket.socket) -> str:
    try:
        return read_option(sock, TCP_ULP, _ULP_NAME, socket.IPPROTO_TCP).rstrip(b'\0').decode('ascii', 'replace')
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):    # MPTCP, or a kernel without it
            return ''
        raise
