# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections of unix sockets to processes outside of the tree: what a policy (ckptd.external) makes of them."""

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import PurePath

from ckptd.errors import CkptError, Finding
from ckptd.external import ANY, Action, unix_peer
from ckptd.kernel.netlink import UnixSocket
from ckptd.kernel.task import read_cgroup2
from ckptd.kernel.unix import SS_LISTEN, Holder, encode_address
from ckptd.objects.files.base import FileEnd, FileLookup, Maker, RestoreContext, finding
from ckptd.objects.files.inherited import asked_for
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.unix.connections import not_blocking
from ckptd.objects.files.unix.names import connect_to_path, identity
from ckptd.objects.files.unix.record import UnixSocketEnd
from ckptd.objects.files.unsupported import describe

# servers that remember nothing of their clients: systemd-journald(8), syslog(3), sd_notify(3)
_STATELESS = frozenset(('/run/systemd/journal/stdout', '/run/systemd/journal/socket', '/run/systemd/journal/dev-log',
                        '/run/systemd/journal/syslog', '/dev/log', '/run/systemd/notify'))
_JOURNAL_STREAM = '/run/systemd/journal/stdout'
_BUSES = ('/run/dbus/system_bus_socket', '/var/run/dbus/system_bus_socket')
_UNITS = ('.service', '.scope', '.socket')


def what_of(own: UnixSocket, peer: UnixSocket | None) -> str:
    """Return the name that policies call this connection: that of the peer, else the own one of a server."""
    return unix_peer(peer.name if peer and peer.name else own.name)


def action_for(own: UnixSocket, peer: UnixSocket | None, tables: JobTables) -> Action:
    """Return what becomes of the connection."""
    what = what_of(own, peer)
    action = tables.external.action_of(what)
    if action == 'refuse' and peer and what in _STATELESS | _user_manager(what):
        return 'reconnect'
    if action == 'reconnect' and not (peer and peer.name):
        return 'refuse'         # a server cannot call its client
    return action


def _user_manager(what: str) -> set[str]:
    """Return the name itself if it is the notification socket of a user's manager."""
    parts = PurePath(what).parts
    return {what} if parts[:3] == ('/', 'run', 'user') and parts[4:] == ('systemd', 'notify') else set()


def outside_findings(end: FileEnd, own: UnixSocket, peer: UnixSocket | None, holder: Holder | None, action: Action,
                     tables: JobTables) -> Iterator[tuple[FileEnd, Finding]]:
    """Yield the row about a connection to the outside. It names the peer: process, unit, name."""
    what = what_of(own, peer)
    reason = (f'{describe(end.file, tables)} ({end.file.link}) is connected to {_where(holder)}, outside of the '
              f'tree{f" ({what})" if what else ""}')
    match action:
        case 'refuse':
            hint = f'checkpoint a tree that has both ends, or say what a restart does: --external={what or "any"}:close'
            if what in _BUSES or what.endswith('/bus'):
                hint += ' (a program that exits then can end its connection itself, as an inhibitor: ckptctl inhibit)'
            yield end, finding('EOPNOTSUPP', reason, hint)
        case 'inherit':
            if own.state == SS_LISTEN:
                yield end, finding('EOPNOTSUPP', f'{reason}, and has not accepted it',
                                   'use close: only an accepted connection can be handed over')
            else:
                yield end, finding('ECONNRESET', reason, asked_for(what or ANY), 'warning')
        case 'close':
            yield end, finding('EPIPE', reason, 'after a restart its peer has closed it', 'warning')
        case 'reconnect' if tables.external.action_of(what) == 'reconnect':
            yield end, finding('ECONNRESET', reason, 'a restart connects it again; unread data is lost', 'warning')


def _where(holder: Holder | None) -> str:
    if holder is None:
        return 'a process'
    try:
        unit = PurePath(read_cgroup2(holder.pid)).name
    except OSError:
        unit = ''
    return f'{holder.comm}[{holder.pid}]{f" of {unit}" if unit.endswith(_UNITS) else ""}'


# ---------------------------------------------------------------- restart

def reconnect_findings(record: UnixSocketEnd, what: str, lookup: FileLookup, tables: JobTables) -> list[Finding]:
    """Refuse a restart whose server is not there."""
    name, sockets = record.peer_name, tables.unix_sockets.values()
    if name.is_path:
        found = lookup.lstat(name.path)
        alive = found is not None and stat.S_ISSOCK(found.st_mode) and any(one.file == identity(found)
                                                                           for one in sockets)
    else:
        alive = any((one.name, one.type) == (name.name, record.type) for one in sockets)
    if alive:
        return []
    return [finding('ECONNREFUSED', f'{what} is to be connected to {name.text} again, and no process answers there',
                    'start that server')]


def reconnect(record: UnixSocketEnd, fd: int, ctx: RestoreContext) -> None:
    """Connect a socket to its server outside of the tree, in the name of the process that had it. CkptError."""
    name, maker = record.peer_name, record.peer_maker
    at = ctx.open(name.path, os.O_PATH) if name.is_path else -1
    try:
        with not_blocking(fd):      # a full backlog is an error
            if ctx.pid(maker.vpid):
                ctx.connect_socket(fd, encode_address(name.name), at,
                                   Maker(maker.vpid, maker.uid, maker.gid, record.peer_groups))
            else:
                connect_to_path(fd, name, at)
        if name.path == _JOURNAL_STREAM:
            _introduce(fd, record.identifier)
    except OSError as error:
        raise CkptError(f'a socket cannot be connected to {name.text} again: {error.strerror}', errno=error.errno,
                        resource=name.text, hint='start that server') from error
    finally:
        if at >= 0:
            os.close(at)


def _introduce(fd: int, identifier: str) -> None:
    """Send the header of a journal stream, as sd_journal_stream_fd(3) does: identifier, unit, priority, level prefix,
    and three flags about forwarding. The journal finds the unit by the cgroup of the sender."""
    lines = (identifier.replace('\n', ' '), '', '6', '1', '0', '0', '0')
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.sendall(''.join(f'{line}\n' for line in lines).encode('utf-8', 'surrogateescape'))
