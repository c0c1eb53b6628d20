# SPDX-License-Identifier: LGPL-2.1-or-later
"""A terminal: either end of a pseudo-terminal (pty(7)), a virtual console, a serial line, or /dev/tty.

    the master is in the tree       a restart makes a new pseudo-terminal, with the old number if that is free
    the master is outside of it     the terminal is a reference: a restart gets the caller's terminal in its place, or
                                    opens it by its name, or none (`detach`): then all files of it are hung up
    hung up                         a slave whose master is closed
    /dev/tty                        opened again by a process of its session
    console, serial line            opened again by its name, with its settings, unless it was the controlling terminal

Settings, size, session and so on exist once for each terminal (terminal.py). What waits between the two ends can only
be taken out. If the tree is killed, that is done last of all; otherwise the checkpoint fails with EAGAIN.
"""

import errno
import fcntl
import os
import select
import signal
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from ckptd.errors import Busy, Finding, ImageDamaged
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel import tty
from ckptd.kernel.creds import CAP_SYS_ADMIN, capget
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.tty_drivers import driver_of
from ckptd.kernel.tty_queue import is_stopped
from ckptd.objects.files.base import (
    Content,
    Endpoint,
    FileEnd,
    FileLookup,
    Kind,
    OpenFile,
    RestoreContext,
    access_of,
    finding,
    open_again,
    opening,
)
from ckptd.objects.files.device import is_device, open_device
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.terminal.state import (
    CLOSED,
    NEVER_OPENED,
    OPEN,
    PTMX,
    Pty,
    TerminalState,
    Unread,
    controlling,
    dump_terminal,
    give_unread,
    hung_up,
    is_slave,
    make_pty,
    pty_findings,
    set_locks,
    slave_of,
    slave_path,
    take_unread,
)
from ckptd.objects.support import Support

OWN = os.makedev(5, 0)
REFERENCE, SLAVE, MASTER, HUNG_UP = range(4)


@layout
class Tty(Struct):
    """An open file of a terminal. device: 5:0 is /dev/tty, the opener's own terminal."""
    path: str
    device: U64
    mode: U32
    side: U8 = REFERENCE
    exclusive: U8 = 0                       # TIOCEXCL
    state: tuple[TerminalState, ...] = ()   # one, unless it is hung up
    pty: tuple[Pty, ...] = ()               # one, if the master is in the tree
    unread: tuple[Unread, ...] = ()         # of the master
    uid: U32 = 0                            # of the file itself, as is its mode; for one that is hung up
    gid: U32 = 0
    cloexec: U8 = 0                         # O_CLOEXEC is a flag of the file, see kernel.tty.open_slave


def is_tty(device: int) -> bool:
    return device != PTMX and bool(driver_of(device))


def _is_line(record: Tty) -> bool:
    """Whether it is a serial line or a console, which a restart finds by its name. As a controlling terminal it is like
    a window."""
    is_controlling = any(state.session or state.foreground for state in record.state)
    return record.device != OWN and not is_slave(record.device) and not is_controlling


def _cannot_open(pty: Pty) -> bool:
    """Whether the slave, through which data is taken out, cannot be opened, or was never opened and must not be."""
    return pty.slave == NEVER_OPENED or bool(pty.locked)


class TtyKind(Kind[Tty], tag='tty', alike=False):
    support = Support('terminals, and both ends of pseudo-terminals', restored='partly',
                      refused='line disciplines other than N_TTY',
                      warned='the terminal of the restart replaces one whose program is outside of the tree')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._masters: dict[tuple[int, int], OpenFile] = {}     # by device of the devpts file system, and number
        self._slaves: dict[tuple[int, int], OpenFile] = {}      # likewise, one for each pseudo-terminal
        self._is_drawn = False

    def matches(self, file: OpenFile) -> bool:
        device = file.stat.st_rdev
        return stat.S_ISCHR(file.stat.st_mode) and not file.is_path and (device == PTMX or is_tty(device))

    # ------------------------------------------------------------ dump

    def findings(self, file: OpenFile) -> list[Finding]:
        with file.duplicate() as fd:
            if file.stat.st_rdev != PTMX and tty.is_hung_up(fd):
                return []
            if file.stat.st_rdev == PTMX and lstat_of_task(file.tid, slave_of(file, fd)) is None:
                return [finding('ENOENT', f'{file.link} is the master of {slave_of(file, fd)}, which is not there',
                                'mount the devpts file system at that place again, or close the terminal')]
            if number := tty.line_discipline(fd):
                return [finding('EOPNOTSUPP', f'{file.link} has the line discipline {number}', 'only terminals in '
                                'line discipline 0 (N_TTY) can be dumped: let the program set it back (TIOCSETD)')]
        return []

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        with file.duplicate() as fd:
            if file.stat.st_rdev == PTMX:
                key = self._key_of_master(file, fd)
                self._masters[key] = file
                return Endpoint(('pty', *key), frozenset({'master'}), frozenset())
            if tty.is_hung_up(fd):
                return None
            key = self._key_of(file, fd)
            if is_slave(tty.device_of(fd)):
                self._slaves.setdefault(key, file)
                return Endpoint(('pty', *key), frozenset({'slave'}), frozenset({'master'}))
            return Endpoint(('tty', *key), frozenset({'line'}), frozenset({'name'}))

    @staticmethod
    def _key_of_master(file: OpenFile, fd: int) -> tuple[int, int]:
        found = lstat_of_task(file.tid, slave_of(file, fd))
        return found.st_dev if found else 0, tty.peer_number(fd)

    @staticmethod
    def _key_of(file: OpenFile, fd: int) -> tuple[int, int]:
        """Return a key of a terminal, equal for both ends of a pseudo-terminal."""
        if file.stat.st_rdev != OWN:
            of = file.stat
            return (of.st_dev, os.minor(of.st_rdev)) if is_slave(of.st_rdev) else (of.st_rdev, 0)
        device = tty.device_of(fd)
        if not is_slave(device):
            return device, 0
        found = lstat_of_task(file.tid, slave_path('/dev/ptmx', os.minor(device), in_devpts=False))
        return found.st_dev if found else 0, os.minor(device)

    def link(self, ends: Sequence[FileEnd], *, is_whole: bool) -> Iterator[tuple[FileEnd, Finding]]:
        held = {end.endpoint.key for end in ends if 'master' in end.endpoint.holds}
        told = set(held)
        for end in ends:
            if end.endpoint.key in told:
                continue
            told.add(end.endpoint.key)
            what = ('the program that shows it is outside of the tree' if end.endpoint.key[0] == 'pty' else
                    'it is kept by its name')
            yield end, finding('ENOTTY', f'{end.file.path} is a terminal, and {what}',
                               'restore with --wait, which gives the tree your terminal in its place', 'warning')

    def dump(self, file: OpenFile, content: Content) -> Tty:
        of = file.stat
        with file.duplicate() as fd:
            if of.st_rdev == PTMX:
                key = self._key_of_master(file, fd)
                pty = self._pty(key, file, fd)
                if not content.is_taken or self._is_exclusive(key) or _cannot_open(pty):
                    self._require_empty(key, file, fd, is_taken=content.is_taken)
                unread = (Unread((), (), (), 0, 1),) if self._is_stopped(key, fd) else ()
                return Tty(file.path, of.st_rdev, of.st_mode, MASTER, tty.is_exclusive(fd),
                           (self._state_of(fd, content),), (pty,), unread)
            cloexec = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_CLOEXEC)
            if tty.is_hung_up(fd):
                return Tty(file.path, of.st_rdev, of.st_mode, HUNG_UP, uid=of.st_uid, gid=of.st_gid, cloexec=cloexec)
            exclusive = tty.is_exclusive(fd)
            master = self._masters.get(key := self._key_of(file, fd))
            if master is None:
                state = dump_terminal(fd, *controlling(file, tty.device_of(fd)), content)
                return Tty(file.path, of.st_rdev, of.st_mode, REFERENCE, exclusive, (state,))
            with master.duplicate() as peer:
                return Tty(file.path, of.st_rdev, of.st_mode, SLAVE, exclusive, (self._state_of(peer, content),),
                           (self._pty(key, master, peer),), cloexec=cloexec)

    def take(self, record: Tty, file: OpenFile, content: Content) -> Tty:
        if record.side != MASTER or _cannot_open(record.pty[0]):
            return record
        with file.duplicate() as fd:
            if self._is_exclusive(self._key_of_master(file, fd)):
                return record
            unread = take_unread(file, fd, content)
        return replace(record, unread=(unread,)) if unread else record

    def _is_exclusive(self, key: tuple[int, int]) -> bool:
        """Whether we may not open the slave, through which data is taken out."""
        slave = self._slaves.get(key)
        if slave is None or capget().effective >> CAP_SYS_ADMIN & 1:
            return False
        with slave.duplicate() as fd:
            return tty.is_exclusive(fd)

    def _require_empty(self, key: tuple[int, int], file: OpenFile, master: int, *, is_taken: bool) -> None:
        """Check that nothing waits to be read at either end. Busy. No call shows an incomplete line: it is not kept."""
        name, waits = slave_of(file, master), tty.polls(master, select.POLLIN | select.POLLPRI)
        slave = self._slaves.get(key)
        if not waits and slave is not None:
            with slave.duplicate() as fd:
                waits = tty.polls(fd, select.POLLIN)
        if waits:
            raise Busy(f'what was written to {name} or its master has not been read yet', errno=errno.EAGAIN,
                       task=file.pid, resource=f'fd {file.fd}', hint='try again when the programs have read it'
                       + ('' if is_taken else ', or use --kill'))

    @staticmethod
    def _state_of(master: int, content: Content) -> TerminalState:
        return dump_terminal(master, tty.session_of(master), tty.foreground_of(master), content)

    def _pty(self, key: tuple[int, int], file: OpenFile, master: int) -> Pty:
        name = slave_of(file, master)
        of = lstat_of_task(file.tid, name) or file.stat
        slave = self._slaves.get(key)
        is_open = OPEN if slave else CLOSED if tty.polls(master, select.POLLHUP) else NEVER_OPENED
        return Pty(key[0] << 32 | key[1], file.path, name, key[1], file.flags & ~os.O_CLOEXEC, of.st_mode, of.st_uid,
                   of.st_gid, is_open, tty.is_locked(master), tty.in_packet_mode(master))

    def _is_stopped(self, key: tuple[int, int], master: int) -> bool:
        slave = self._slaves.get(key)
        if slave is None or not slave.writable or tty.polls(master, select.POLLIN):
            return False        # with output that waits, the terminal may be full; `take` finds out
        with slave.duplicate() as fd:
            return is_stopped(fd)

    # ------------------------------------------------------------ restart

    def sessions(self, record: Tty) -> Iterable[int]:
        return [state.session for state in record.state if record.pty]

    def restart_findings(self, record: Tty, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if record.side in (MASTER, SLAVE) and not (record.pty and record.state):
            raise ImageDamaged(f'{saved.link}: a pseudo-terminal without its state', resource=saved.link)
        if record.pty:
            return pty_findings(record.pty[0], lookup)
        if record.side == HUNG_UP or record.device == OWN:
            return []
        if not _is_line(record):
            if lookup.detach_terminal:
                return [finding('ENOTTY', f'{record.path} comes back hung up', 'reading from it gives end-of-file',
                                'warning')]
            if lookup.terminal:
                return []
        found = lookup.lstat(record.path)
        if found is None or not is_device(found, record.device):
            return [finding('ENOTTY', f'{record.path} is a terminal that is gone', 'restore with --wait in a terminal, '
                            'which takes its place, or with --terminal=detach')]
        if not lookup.may(record.path, access_of(saved.flags)):
            return [finding('EACCES', f'{record.path} belongs to another user now', 'restore with --wait in a '
                            'terminal, which takes its place, or with --terminal=detach')]
        return [finding('ENOTTY', f'{record.path} is opened again by its name', 'it may be another window now',
                        'warning')]

    def late(self, record: Tty, saved: SavedFile) -> bool:
        return record.device == OWN and record.side in (REFERENCE, SLAVE)

    def create(self, record: Tty, saved: SavedFile, ctx: RestoreContext) -> int:
        flags = opening(saved.flags) | (os.O_CLOEXEC if record.cloexec else 0)
        if record.side == HUNG_UP:
            return hung_up(record.device, flags, ctx, (record.mode, record.uid, record.gid))
        if record.device == OWN:
            return self._open_own(record, saved, ctx)
        if record.pty:
            master = _master(record, ctx)
            return os.dup(master) if record.side == MASTER else tty.open_slave(master, flags)
        if not _is_line(record):
            if ctx.detach_terminal:
                return hung_up(record.device, flags, ctx)
            if ctx.terminal_fd >= 0:
                return open_again(ctx.terminal_fd, flags)
        # opening a serial line would wait for its carrier (termios(3))
        return open_device(record.path, record.device, flags | os.O_NONBLOCK, ctx)

    @staticmethod
    def _open_own(record: Tty, saved: SavedFile, ctx: RestoreContext) -> int:
        """Let a process that has the file open /dev/tty. If it has no controlling terminal, it gets the terminal that
        the file was of."""
        flags = opening(saved.flags)
        for vpid, _ in ctx.holders(saved.file_id):
            try:
                return ctx.open_by(vpid, '/dev/tty', flags | os.O_NOCTTY)
            except OSError as error:
                if error.errno not in (errno.ENXIO, errno.EIO):
                    raise
        if record.pty:
            return tty.open_slave(_master(record, ctx), flags)
        return open_again(ctx.terminal_fd, flags) if ctx.terminal_fd >= 0 else hung_up(record.device, flags, ctx)

    def connect(self, record: Tty, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.side == MASTER:
            [pty], [state] = record.pty, record.state
            if any(state.locks):
                set_locks(fd, state.locks, saved.link)
            if pty.locked:
                tty.set_locked(fd, True)
            if pty.packet_mode:
                tty.set_packet_mode(fd)
            for unread in record.unread[:1]:
                give_unread(unread, fd, saved.link, ctx)

    def watch(self, record: Tty, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.side in (SLAVE, MASTER) and record.exclusive:
            tty.set_exclusive(fd)       # nothing opens it any more

    def commit(self, record: Tty, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.side != REFERENCE or not record.state:
            return
        [state] = record.state
        if _is_line(record):
            tty.set_settings(fd, state.settings)
        elif ctx.terminal_fd >= 0 and not ctx.detach_terminal and state.foreground and not self._is_drawn:
            self._is_drawn = True
            tty.set_settings(ctx.terminal_fd, state.settings)
            with suppress(ProcessLookupError, PermissionError):
                _redraw(ctx.pid(state.foreground))


def _redraw(group: int) -> None:
    """Let full-screen programs of the foreground group draw again, on a terminal that does not show what they drew
    before and may have another size."""
    if group and os.getpgid(group) == group:
        os.killpg(group, signal.SIGWINCH)


def _master(record: Tty, ctx: RestoreContext) -> int:
    [pty], [state] = record.pty, record.state
    return ctx.once(('pty', pty.id), lambda: make_pty(pty, state, ctx))
