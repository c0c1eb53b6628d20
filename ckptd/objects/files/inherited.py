# SPDX-License-Identifier: LGPL-2.1-or-later
"""A socket with a peer outside of the tree that the caller of a restart hands over: `--external=WHAT:inherit` at the
checkpoint, `restore --inherit WHAT=FD`.

The tree gets the open socket of the caller itself, with its peer, its unread data and its options; only its file status
flags, such as O_NONBLOCK, become those of the image. It must be connected, of the family, type and protocol of the one
that it replaces, because the program goes on to use it as that.
"""

import fcntl
import os
import socket
from contextlib import suppress
from typing import NamedTuple, NoReturn, Self

from ckptd.errors import Finding
from ckptd.image.grammar import U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.task import read_link
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.support import Support


@layout
class InheritedSocket(Struct):
    """A socket that is not in the image."""
    what: str           # the peer, as ckptd.external names it
    family: U32
    type: U32
    protocol: U32


class _Form(NamedTuple):
    """The arguments of socket(2) that make such a socket."""
    family: int
    type: int
    protocol: int

    @classmethod
    def of(cls, record: InheritedSocket) -> Self:
        return cls(record.family, record.type, record.protocol)

    def __str__(self) -> str:
        names = (_name(socket.AddressFamily, self.family), _name(socket.SocketKind, self.type))
        return ' '.join(names) + (f' (protocol {self.protocol})' if self.protocol else '')


class InheritedKind(Kind[InheritedSocket], tag='inherited'):
    support = Support('sockets connected to the outside, with --external=...:inherit: the restart is handed them',
                      refused='a restart without --inherit, or with a socket of another kind')

    def matches(self, file: OpenFile) -> bool:
        return False            # until `dump` each is of its own kind

    def dump(self, file: OpenFile, content: Content) -> NoReturn:
        raise AssertionError('its own kind dumps it, by dump_inherited')

    def restart_findings(self, record: InheritedSocket, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        what, form = record.what, _Form.of(record)
        fd = lookup.inherited.take(what, saved.file_id)
        if fd < 0:
            return [finding('ENOTCONN', f'{saved.link} is a connection to {what}, which the caller of the restart is '
                            'to hand over', f'connect a socket ({form}), and give it: --inherit {what}=FD')]
        if wrong := _wrong(fd, form):
            return [finding('EPROTOTYPE', f'the file descriptor given for {what} is {wrong}',
                            f'give a connected socket ({form})')]
        return []

    def create(self, record: InheritedSocket, saved: SavedFile, ctx: RestoreContext) -> int:
        return fcntl.fcntl(ctx.inherited.take(record.what, saved.file_id), fcntl.F_DUPFD_CLOEXEC, 0)


def asked_for(what: str) -> str:
    """Return what a checkpoint says about the restart of such a connection."""
    return f'a restart must be handed a socket for it: restore --inherit {what}=FD'


def dump_inherited(file: OpenFile, what: str) -> InheritedSocket:
    """Return the record of a socket that another kind has found. what: the name of its peer."""
    with file.as_socket() as sock:
        return InheritedSocket(what, sock.family, sock.type, sock.proto)


def _wrong(fd: int, form: _Form) -> str:
    """Return what an fd is, if it cannot take the place of such a socket; else ''."""
    link = read_link(os.getpid(), f'fd/{fd}')
    if not link.startswith('socket:['):
        return link
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:        # O_PATH
        return f'{link}, which cannot be used: {error.strerror}'
    try:
        found = _Form(sock.family, sock.type, sock.proto)
        if found != form:
            return f'a socket of another kind ({found})'
        with suppress(OSError):
            sock.getpeername()
            return ''
        return 'a socket without a connection'
    finally:
        sock.detach()


def _name(names: type[socket.AddressFamily | socket.SocketKind], number: int) -> str:
    with suppress(ValueError):
        return names(number).name
    return str(number)
