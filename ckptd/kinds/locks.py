# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks and leases on a file, as its holders' fdinfo has them: fcntl_locking(2), flock(2), F_SETLEASE of fcntl(2)."""

from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.kernel.fdinfo import read_fdinfo
from ckptd.kernel.status import read_status
from ckptd.kinds.base import OpenFile

POSIX, FLOCK, OFD, LEASE = 1, 2, 3, 4
EOF = (1 << 64) - 1
_NAMES = {'POSIX': POSIX, 'FLOCK': FLOCK, 'OFDLCK': OFD, 'LEASE': LEASE}


@layout
class Lock(Struct):
    """kind: POSIX, FLOCK, OFD, LEASE. write: 1 for a write lock or lease. Bytes start to end, both inclusive, EOF: no
    end. holder: vpid of the process that a POSIX lock belongs to; other locks belong to the description (0)."""
    kind: U8
    write: U8
    start: U64
    end: U64
    holder: U32


def parse_lock(line: str, holder: int) -> Lock | None:
    """'1: POSIX  ADVISORY  WRITE 359 00:13:11691 0 EOF'. None for what is not the task's own, a delegation of nfsd."""
    _, name, _, access, _, _, start, end = line.split()
    kind = _NAMES.get(name)
    if kind is None:
        return None
    return Lock(kind, int(access != 'READ'), int(start), EOF if end == 'EOF' else int(end),
                holder if kind == POSIX else 0)


def read_locks(file: OpenFile) -> tuple[Lock, ...]:
    """Locks of the description, and POSIX locks of every process that holds it."""
    found: dict[Lock, None] = {}
    for pid, fd in ((file.tid, file.fd), *file.holders):
        # of POSIX locks fdinfo shows those of its own process only (fs/locks.c, __show_fd_locks)
        info = file.info if (pid, fd) == (file.tid, file.fd) else read_fdinfo(pid, fd)
        lines = info.fields.get('lock', [])
        holder = read_status(pid).ns_tgid[-1] if lines else 0
        found.update((lock, None) for line in lines if (lock := parse_lock(line, holder)))
    return tuple(found)


def has_locks(file: OpenFile) -> bool:
    return 'lock' in file.info.fields
