# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state that the kernel keeps once for each terminal, and pseudo-terminals that a restart makes again (pty(7))."""

import errno
import os
from itertools import accumulate, pairwise
from pathlib import PurePosixPath

from ckptd.errors import CkptError, Finding, ImageDamaged
from ckptd.faults import fault
from ckptd.image.grammar import U8, U16, U32, U64, Struct, layout
from ckptd.image.records import Extent
from ckptd.journal.steps import TakeFromTerminal
from ckptd.kernel import tty
from ckptd.kernel.stat import read_stat
from ckptd.kernel.statfs import DEVPTS_SUPER_MAGIC
from ckptd.kernel.tty_queue import Waiting, put_back, take_out
from ckptd.objects.files.base import Content, FileLookup, OpenFile, RestoreContext, finding, opening
from ckptd.objects.files.content import owner_findings, set_owner
from ckptd.objects.files.device import is_device, open_device

PTMX = os.makedev(5, 2)
_SLAVES = 136       # major number, Documentation/admin-guide/devices.txt
_ATTEMPTS = 4096    # the sysctl kernel.pty.max is not higher by default
_MOST_INPUT = 4095      # bytes, drivers/tty/n_tty.c: N_TTY_BUF_SIZE
NEVER_OPENED, OPEN, CLOSED = range(3)


@layout
class TerminalState(Struct):
    """The state of a terminal."""
    settings: bytes         # struct termios2
    locks: bytes            # struct termios: bits of the settings that may not be changed
    rows: U16
    columns: U16
    x_pixels: U16
    y_pixels: U16
    session: U32            # vpid of the leader whose controlling terminal it is, 0 for none
    foreground: U32         # foreground process group as a vpid, 0 for none in the tree


@layout
class Pty(Struct):
    """A pseudo-terminal whose master is in the tree."""
    id: U64                     # equal for all files of one pseudo-terminal
    ptmx: str                   # path of the device that makes it
    name: str                   # path of the slave
    pts: U32                    # N of its slave /dev/pts/N
    flags: U32                  # O_* of the master
    mode: U32                   # of the slave, as are uid and gid
    uid: U32
    gid: U32
    slave: U8                   # NEVER_OPENED, OPEN, or CLOSED: the master then reads EIO
    locked: U8                  # the slave cannot be opened yet
    packet_mode: U8             # TIOCPKT


@layout
class Unread(Struct):
    """Data that waits in a pseudo-terminal, see kernel.tty_queue.Waiting."""
    output: tuple[Extent, ...]      # for the master
    input: tuple[Extent, ...]       # for the slave
    lines: tuple[U32, ...]          # lengths in `input`
    events: U8
    stopped: U8                     # the output is stopped (tcflow(3), Ctrl-S)


# ---------------------------------------------------------------- dump

def slave_path(link: str, number: int, *, in_devpts: bool) -> str:
    """Return the path of the slave of a master that was opened as `link`. A ptmx outside of a devpts file system makes
    pseudo-terminals of the one that is mounted beside it, at "pts" (Documentation/filesystems/devpts.rst)."""
    directory = PurePosixPath(link).parent
    return str((directory if in_devpts else directory / 'pts') / str(number))


def slave_of(file: OpenFile, master: int) -> str:
    """Return the path of the slave of a master."""
    return slave_path(file.link, tty.peer_number(master), in_devpts=file.magic == DEVPTS_SUPER_MAGIC)


def dump_terminal(fd: int, session: int, foreground: int, content: Content) -> TerminalState:
    return TerminalState(tty.read_settings(fd), tty.read_locks(fd), *tty.read_size(fd), content.vpid(session),
                         content.vpid(foreground))


def controlling(file: OpenFile, device: int) -> tuple[int, int]:
    """Return session and foreground group of a terminal if it is the controlling one of the task that has the file;
    else zeros. Only processes of the session may ask the terminal itself (TIOCGSID)."""
    own = read_stat(file.tid)
    # proc_pid_stat(5): minor in bits 31 to 20 and 7 to 0, major in 15 to 8
    number = own.tty_nr & 0xFFFFFFFF
    if os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00) != device:
        return 0, 0
    return own.session, max(own.tpgid, 0)


def is_slave(device: int) -> bool:
    return os.major(device) == _SLAVES


# ---------------------------------------------------------------- restart

def open_master(ptmx: str, flags: int, ctx: RestoreContext) -> int:
    """Make a pseudo-terminal. Return its master; the slave can be opened."""
    master = open_device(ptmx, PTMX, opening(flags) & ~os.O_NONBLOCK, ctx)
    try:
        tty.set_locked(master, False)
    except BaseException:
        os.close(master)
        raise
    return master


def open_numbered(ptmx: str, number: int, flags: int, ctx: RestoreContext) -> int:
    """Make a pseudo-terminal with this number, if that is free. Return the master; the slave can be opened.

    The kernel gives the lowest free number, so those below are used up for a moment.
    """
    made: list[int] = []
    try:
        while True:
            try:
                made.append(open_master(ptmx, flags, ctx))
            except OSError as error:
                # too many of them are open, by us or by all (kernel.pty.max)
                if not made or error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOSPC):
                    raise
                return made.pop(0)
            got = tty.peer_number(made[-1])
            if got == number:
                return made.pop()
            if got > number or len(made) == _ATTEMPTS:
                return made.pop(0)      # it is another terminal's
    finally:
        for fd in made:
            os.close(fd)


def make_pty(pty: Pty, state: TerminalState, ctx: RestoreContext) -> int:
    """Make a pseudo-terminal with its old settings, and its old number if that is free. Return the master."""
    found = open_numbered(pty.ptmx, pty.pts, pty.flags, ctx)
    try:
        tty.set_settings(found, state.settings)
        tty.set_size(found, tty.Winsize(state.rows, state.columns, state.x_pixels, state.y_pixels))
        if pty.slave != NEVER_OPENED:
            _open_first(found, pty, state, ctx)
        elif state.session:
            # a master stands for its slave (drivers/tty/tty_jobctrl.c, tiocsctty)
            ctx.once(('terminal', state.session), lambda: os.dup(found))
    except BaseException:
        os.close(found)
        raise
    return found


def _open_first(master: int, pty: Pty, state: TerminalState, ctx: RestoreContext) -> None:
    """Open the slave, so that it has been open. It gets its owner, and the session leader will find it."""
    slave = tty.open_slave(master, os.O_RDWR)
    try:
        set_owner(slave, pty.mode, pty.uid, pty.gid, ctx)
        if state.session:
            ctx.once(('terminal', state.session), lambda: os.dup(slave))
    finally:
        os.close(slave)


def pty_findings(pty: Pty, lookup: FileLookup) -> list[Finding]:
    found = lookup.lstat(pty.ptmx)
    if found is None or not is_device(found, PTMX):
        return [finding('ENOENT', f'{pty.ptmx}, which makes pseudo-terminals, is missing',
                        'mount a devpts file system at its old place')]
    if not lookup.may(pty.ptmx, os.R_OK | os.W_OK):
        return [finding('EACCES', f'{pty.ptmx} cannot be opened', 'run as its owner, or as root')]
    rows = owner_findings(pty.name, pty.uid, pty.gid, lookup)
    if lookup.lstat(pty.name) is not None:
        rows.append(finding('EEXIST', f'{pty.name} is another terminal now', 'it gets another number: SSH_TTY, '
                            'GPG_TTY, utmp and what the program remembers name the old one', 'warning'))
    return rows


def hung_up(device: int, flags: int, ctx: RestoreContext, owner: tuple[int, int, int] | None = None) -> int:
    """Return a terminal whose master is closed: it reads end-of-file, and writing to it fails with EIO. device: of the
    former terminal. owner: mode, uid and gid of the file."""
    master = open_numbered('/dev/ptmx', os.minor(device) if is_slave(device) else 0, os.O_RDWR, ctx)
    try:
        fd = tty.open_slave(master, flags & ~os.O_NONBLOCK)
    finally:
        os.close(master)
    try:
        if owner is not None:
            set_owner(fd, *owner, ctx)
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_locks(master: int, locks: bytes, link: str) -> None:
    try:
        tty.set_locks(master, locks)
    except PermissionError as error:
        raise CkptError(f'{link}: its settings were locked (TIOCSLCKTRMIOS), which is not allowed', errno=errno.EPERM,
                        resource=link, hint='restore it as root') from error


# ---------------------------------------------------------------- data

def take_unread(file: OpenFile, master: int, content: Content) -> Unread | None:
    """Take out what waits in a pseudo-terminal. None if nothing waits."""
    step = TakeFromTerminal(file.pid, read_stat(file.pid).start_time, file.fd, tty.peer_number(master),
                            tty.read_settings(master))
    content.note(step)
    waiting = take_out(master)
    if not waiting:
        return None
    content.note(step.with_data(waiting))
    fault('taken-one')
    data = b''.join(waiting.lines)
    return Unread((content.add([waiting.output]),) if waiting.output else (), (content.add([data]),) if data else (),
                  tuple(map(len, waiting.lines)), waiting.events, waiting.stopped)


def give_unread(unread: Unread, master: int, link: str, ctx: RestoreContext) -> None:
    """Put back what waited, into the terminal with its old settings."""
    output, data = (b''.join(ctx.pread(extent, extent.length, 0) for extent in extents)
                    for extents in (unread.output, unread.input))
    if sum(unread.lines) != len(data) or len(data) > _MOST_INPUT or len(unread.lines) > _MOST_INPUT:
        raise ImageDamaged(f'{link}: {len(data):,} bytes of input in {len(unread.lines):,} lines', resource=link)
    ends = [*accumulate(unread.lines, initial=0)]
    lines = tuple(data[start:end] for start, end in pairwise(ends))
    try:
        put_back(master, Waiting(output, lines, unread.events, bool(unread.stopped)))
    except (BlockingIOError, TimeoutError) as error:
        raise CkptError(f'{link}: the terminal does not accept all of its former data', errno=errno.ENOSPC,
                        resource=link) from error
