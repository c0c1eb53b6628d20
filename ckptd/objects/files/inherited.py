# SPDX-License-Identifier: LGPL-2.1-or-later
"""A socket or pipe whose other end is outside of the tree, and that the caller of a restart hands over:
`--external=WHAT:inherit` at the checkpoint, `restore --inherit WHAT=FD`.

The tree gets the open file of the caller itself, with its other end, its unread data and its options; only its file
status flags, such as O_NONBLOCK, become those of the image. It must be of the same form as the file that it replaces,
because the program goes on to use it as that: a connected socket of the same family, type and protocol, or a pipe that
is open in the same way.
"""

import fcntl
import os
import socket
import stat
from contextlib import suppress
from typing import NamedTuple, NoReturn

from ckptd.errors import Finding
from ckptd.image.grammar import U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.task import read_link
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.support import Support

_ACCESS = {os.O_RDONLY: 'reading', os.O_WRONLY: 'writing', os.O_RDWR: 'reading and writing'}


@layout
class InheritedFile(Struct):
    """A file that is not in the image. A pipe has a family, type and protocol of 0."""
    what: str           # the peer, as ckptd.external names it
    family: U32         # of socket(2)
    type: U32           # likewise
    protocol: U32       # likewise


class _Form(NamedTuple):
    """The arguments of socket(2) that make such a socket; or the access mode of a pipe, which has no family."""
    family: int = 0
    type: int = 0
    protocol: int = 0
    access: int = 0     # O_RDONLY, O_WRONLY, O_RDWR

    def __str__(self) -> str:
        if not self.family:
            return f'a pipe open for {_ACCESS.get(self.access, "nothing")}'
        names = f'{_name(socket.AddressFamily, self.family)} {_name(socket.SocketKind, self.type)}'
        return f'a connected socket ({names}{f", protocol {self.protocol}" if self.protocol else ""})'


class InheritedKind(Kind[InheritedFile], tag='inherited'):
    support = Support('sockets and pipes that lead out of the tree, with --external=...:inherit: the restart is handed '
                      'them', refused='a restart without --inherit, or with a file of another kind')

    def matches(self, file: OpenFile) -> bool:
        return False            # until `dump` each is of its own kind

    def dump(self, file: OpenFile, content: Content) -> NoReturn:
        raise AssertionError('its own kind dumps it, by dump_inherited')

    def restart_findings(self, record: InheritedFile, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        form, fd = _form(record, saved), lookup.inherited.take(record.what, saved.file_id)
        if fd < 0:
            return [finding('ENOTCONN', f'{saved.link} leads out of the tree, to {record.what}, and the caller of the '
                            'restart is to hand it over', f'open {form}, and give it: --inherit {record.what}=FD')]
        if (given := _form_of(fd)) != form:
            return [finding('EPROTOTYPE', f'the file descriptor given for {record.what} is {given}', f'give {form}')]
        return []

    def create(self, record: InheritedFile, saved: SavedFile, ctx: RestoreContext) -> int:
        return fcntl.fcntl(ctx.inherited.take(record.what, saved.file_id), fcntl.F_DUPFD_CLOEXEC, 0)


def asked_for(what: str) -> str:
    """Return what a checkpoint says about the restart of such a file."""
    return f'a restart must be handed it: restore --inherit {what}=FD'


def dump_inherited(file: OpenFile, what: str) -> InheritedFile:
    """Return the record of a file that another kind has found. what: the name of its peer."""
    if not stat.S_ISSOCK(file.stat.st_mode):
        return InheritedFile(what, 0, 0, 0)
    with file.as_socket() as sock:
        return InheritedFile(what, sock.family, sock.type, sock.proto)


def _form(record: InheritedFile, saved: SavedFile) -> _Form:
    """Return the form of the file that is needed."""
    if record.family:
        return _Form(record.family, record.type, record.protocol)
    return _Form(access=saved.flags & os.O_ACCMODE)


def _form_of(fd: int) -> _Form | str:
    """Return the form of what the caller has given; of what cannot be used, a description."""
    link = read_link(os.getpid(), f'fd/{fd}')
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        return f'{link}, which is not open (O_PATH)'
    if link.startswith('pipe:['):
        return _Form(access=fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
    if not link.startswith('socket:['):
        return link
    sock = socket.socket(fileno=fd)
    try:
        with suppress(OSError):
            sock.getpeername()
            return _Form(sock.family, sock.type, sock.proto)
        return 'a socket without a connection'
    finally:
        sock.detach()


def _name(names: type[socket.AddressFamily | socket.SocketKind], number: int) -> str:
    with suppress(ValueError):
        return names(number).name
    return str(number)
