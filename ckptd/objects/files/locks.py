# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks and leases on a file, from fdinfo of its holders: fcntl_locking(2), flock(2), F_SETLEASE of fcntl(2)."""

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import replace

from ckptd.errors import Busy, CkptError, Finding, NotSupported
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.creds import CAP_LEASE
from ckptd.kernel.fdinfo import read_fdinfo
from ckptd.kernel.status import read_status
from ckptd.objects.files.base import FileLookup, OpenFile, RestoreContext, finding

# <asm-generic/fcntl.h>; struct flock {short l_type, l_whence; off_t l_start, l_len; pid_t l_pid;}, 32 bytes
F_SETLK = 6
F_OFD_GETLK = 36
F_OFD_SETLK = 37
_FLOCK = struct.Struct('@hhqqi4x')

POSIX, FLOCK, OFD, LEASE = 1, 2, 3, 4
EOF = (1 << 64) - 1
TO_READ, TO_NONE = 1, 2         # Lock.breaking
_NAMES = {'POSIX': POSIX, 'FLOCK': FLOCK, 'OFDLCK': OFD, 'LEASE': LEASE}


@layout
class Lock(Struct):
    """A lock or lease.

    kind: POSIX, FLOCK, OFD, LEASE. write: 1 for a write lock or lease. Bytes start to end, both inclusive, EOF: no end.
    holder: vpid of the process that a POSIX lock belongs to; other locks belong to the description (0). breaking: the
    future type of a lease that another process waits for or was refused, TO_READ or TO_NONE.
    """
    kind: U8
    write: U8
    start: U64
    end: U64
    holder: U32
    breaking: U8 = 0


def parse_lock(line: str, holder: int) -> Lock | None:
    """Parse '1: POSIX  ADVISORY  WRITE 359 00:13:11691 0 EOF'. None for a delegation of nfsd, which is not the task's
    own.

    'LEASE  BREAKING  UNLCK' shows the future type of the lease (fs/locks.c, target_leasetype). Only TO_READ implies a
    write lease; for a lease that is to end, `read_locks` finds out its type.
    """
    _, name, state, access, _, _, start, end = line.split()
    kind = _NAMES.get(name)
    if kind is None:
        return None
    breaking = (TO_READ if access == 'READ' else TO_NONE) if (kind, state) == (LEASE, 'BREAKING') else 0
    return Lock(kind, int(access != 'READ' or bool(breaking)), int(start), EOF if end == 'EOF' else int(end),
                holder if kind == POSIX else 0, breaking)


def read_locks(file: OpenFile) -> tuple[Lock, ...]:
    """Read the locks of the description, and the POSIX locks of every process that holds it."""
    found: dict[Lock, None] = {}
    for pid, fd in ((file.tid, file.fd), *file.holders):
        # fdinfo shows only the POSIX locks of its own process (fs/locks.c, __show_fd_locks)
        info = file.info if (pid, fd) == (file.tid, file.fd) else read_fdinfo(pid, fd)
        lines = info.fields.get('lock', [])
        holder = read_status(pid).ns_tgid[-1] if lines else 0
        found.update((lock, None) for line in lines if (lock := parse_lock(line, holder)))
    return tuple(_with_type(lock, file) if lock.breaking == TO_NONE else lock for lock in found)


def _with_type(lease: Lock, file: OpenFile) -> Lock:
    """Find out whether a lease that is to end keeps readers out, as a write lease does. It is being broken already, so
    opening the file has no further effect on its holder (fs/locks.c, __break_lease)."""
    try:
        with file.reopen(os.O_RDONLY):
            return replace(lease, write=0)
    except BlockingIOError:
        return lease
    except PermissionError:         # a read lease belongs to a description that is not writable
        return replace(lease, write=int(file.writable))


def has_locks(file: OpenFile) -> bool:
    return 'lock' in file.info.fields


# ---------------------------------------------------------------- restart

def lock_findings(locks: Sequence[Lock], path: str, lookup: FileLookup) -> list[Finding]:
    """List locks that another program holds now, and leases that the user may not take. For flock(2) and leases no call
    shows that without taking one."""
    return [*_lease_findings(locks, path, lookup), *_held_ranges(locks, path, lookup)]


def _lease_findings(locks: Sequence[Lock], path: str, lookup: FileLookup) -> list[Finding]:
    """List leases that the user may not take. Opening a leased file makes the opener wait, so only the file's owner may
    take a lease (fcntl(2), F_SETLEASE)."""
    leases = [lock for lock in locks if lock.kind == LEASE]
    found = lookup.lstat(path) if leases else None
    if found is None:
        return []
    if any(lease.breaking == TO_NONE for lease in leases) and not lookup.may(path, os.W_OK):
        return [finding('EACCES', f'{path} is leased, another program waited to write it, and uid {lookup.uid} may not',
                        'restore as root, or checkpoint again when the program has released the lease')]
    if found.st_uid == lookup.uid or lookup.capable(CAP_LEASE):
        return []
    return [finding('EACCES', f'{path} is leased and belongs to uid {found.st_uid}, and uid {lookup.uid} may not take '
                    'a lease on it', 'release the lease (F_SETLEASE, F_UNLCK) first, or restore as root')]


def _held_ranges(locks: Sequence[Lock], path: str, lookup: FileLookup) -> list[Finding]:
    ranges = [lock for lock in locks if lock.kind in (POSIX, OFD)]
    if not ranges:
        return []
    try:
        fd = lookup.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return []       # the user may not read it; the restart then finds out
    try:
        return [finding('EBUSY', f'{path} is locked by {holder}', 'end that program, or wait for it')
                for holder in dict.fromkeys(_holder(fd, lock) for lock in ranges) if holder]
    finally:
        os.close(fd)


def _holder(fd: int, lock: Lock) -> str:
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, F_OFD_GETLK, _flock(lock)))
    if kind == fcntl.F_UNLCK:
        return ''
    return f'process {pid}' if pid > 0 else 'another program'      # -1: an OFD lock, which belongs to no process


def restore_locks(locks: Sequence[Lock], path: str, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
    """Take the locks again. Busy if another program has one now.

    POSIX locks belong to a process, which loses them when it closes any fd of the file (fcntl_locking(2)). So no
    process may close one after this.
    """
    for lock in locks:
        try:
            _take(lock, path, saved, fd, ctx)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise CkptError(f'{path} cannot be locked again: {error.strerror}', errno=error.errno,
                                resource=path) from error
            if lock.kind == LEASE:
                raise _no_lease(lock, path) from error
            raise Busy(f'{path} is locked by another program', resource=path,
                       hint='end the program that has it locked, or wait for it') from error


def _no_lease(lease: Lock, path: str) -> Busy:
    """Return the error for a lease. A read lease requires that no other program has the file open for writing, a write
    lease that none has it open at all (fcntl(2))."""
    name, how = ('write', '') if lease.write else ('read', ' for writing')
    return Busy(f'{path} had a {name} lease, which cannot be taken again while another program has the file open{how}',
                resource=path, hint=f'end that program (fuser -v {path} shows it), or wait for it')


def _take(lock: Lock, path: str, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
    if lock.kind == POSIX:
        vpid, number = _lead(lock, saved, path, ctx)
        ctx.call(vpid, 'fcntl', number, F_SETLK, _flock(lock))
    elif lock.kind == OFD:
        fcntl.fcntl(fd, F_OFD_SETLK, _flock(lock))
    else:
        name, *arguments = _call(lock)
        # It belongs to the description, but is shown as that of the process that took it. For a lease that process gets
        # the signal, with the fd that it used (fs/locks.c, lease_setup).
        for vpid, number in ctx.holders(saved.file_id)[:1]:
            ctx.call(vpid, name, number, *arguments)
            break
        else:
            fcntl.flock(fd, arguments[0]) if lock.kind == FLOCK else fcntl.fcntl(fd, *arguments)
        if lock.breaking:
            _break(lock, path, ctx)


def _break(lease: Lock, path: str, ctx: RestoreContext) -> None:
    """Begin to break a lease, as opening the file had done. Its holder has fs.lease-break-time seconds from now on.

    The signal that it gets is discarded before it runs: it has already received one, or has one pending in the image.
    """
    try:
        os.close(ctx.open(path, (os.O_RDONLY if lease.breaking == TO_READ else os.O_WRONLY) | os.O_NONBLOCK))
    except BlockingIOError:
        return
    raise CkptError(f'{path} has no lease that another program waits for', resource=path)


def _call(lock: Lock) -> tuple[str, *tuple[int, ...]]:
    """Return the system call that takes the lock, without the fd."""
    if lock.kind == FLOCK:
        return 'flock', (fcntl.LOCK_EX if lock.write else fcntl.LOCK_SH) | fcntl.LOCK_NB
    return 'fcntl', fcntl.F_SETLEASE, fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK


def _lead(lock: Lock, saved: SavedFile, path: str, ctx: RestoreContext) -> tuple[int, int]:
    """Return (vpid, fd) of the process that takes a POSIX lock. Processes that share an fd table share their locks."""
    holders = ctx.holders(saved.file_id)
    own = [(vpid, number) for vpid, number in holders if vpid == lock.holder]
    if own or len(holders) == 1:
        return (own or holders)[0]
    raise NotSupported(f'{path}: process {lock.holder} has a lock and no longer an fd of it', resource=path,
                       hint='release the lock before the checkpoint')


def _flock(lock: Lock) -> bytes:
    length = 0 if lock.end == EOF else lock.end - lock.start + 1
    return _FLOCK.pack(fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK, os.SEEK_SET, lock.start, length, 0)
