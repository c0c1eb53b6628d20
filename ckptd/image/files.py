# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of an image: open, write and read them, with errors that name the path and say what to do.

An image may come from any source, so a reader follows no symbolic link and opens only regular files.
"""

import errno
import hashlib
import os
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptd.errors import ImageDamaged, SpoolFailed

BUFFER = 4 << 20
_BY_FD = ('/', 'proc', 'self', 'fd')
_PIECE = 64 << 10       # data just read is still in the processor's cache: this takes a quarter less time than 256 KiB
                        # at once

_HINTS = {
    errno.ENOSPC: "free space on the spool's file system (ckptctl remove IMAGE) or choose another with --spool DIR",
    errno.EDQUOT: 'remove images (ckptctl remove IMAGE) or raise the quota, or choose another spool with --spool DIR',
    errno.EROFS: 'mount the file system of the spool read-write, or choose another with --spool DIR',
    errno.ENOENT: 'the spool has vanished: mount or create it again, or choose another with --spool DIR',
    errno.ENOTDIR: 'the spool must be a directory: create it, or choose another with --spool DIR',
    errno.ESTALE: 'the network file system of the spool went away: mount it again, or choose another with --spool DIR',
    errno.EACCES: 'ckptd must write in the spool: correct its owner and mode, or choose another with --spool DIR',
    errno.EIO: 'the disk of the spool fails: see the kernel log (journalctl -k), and choose another with --spool DIR',
    errno.EEXIST: 'an image of this name exists: try again, as ids are random',
    errno.EFBIG: 'the image is larger than a file may be: raise the file size limit (ulimit -f) of ckptd',
}
_HINTS[errno.EPERM], _HINTS[errno.ENOTEMPTY] = _HINTS[errno.EACCES], _HINTS[errno.EEXIST]


def spool_failed(path: Path, error: OSError) -> SpoolFailed:
    """Make the SpoolFailed for an OSError on `path`."""
    number, shown = error.errno or errno.EIO, _shown(path)
    return SpoolFailed(f'cannot write {shown}: {os.strerror(number)}', errno=number, resource=shown, phase='write',
                       hint=_HINTS.get(number))


def _shown(path: Path) -> str:
    """Return a path for people. A path below an open directory is shown with the directory's name."""
    if path.parts[:4] != _BY_FD:
        return str(path)
    try:
        return str(Path(os.readlink(Path(*path.parts[:5])), *path.parts[5:]))  # noqa: PTH115
    except OSError:
        return str(path)


@contextmanager
def spooling(path: Path) -> Iterator[None]:
    """Convert an OSError of the body to a SpoolFailed that names `path`."""
    try:
        yield
    except OSError as error:
        raise spool_failed(path, error) from error


def require_room(path: Path, size: int, keep_free: int, *, at: int | None = None, phase: str = 'write') -> None:
    """Check that `size` more bytes leave at least `keep_free` in the file system of `path`. SpoolFailed.

    at: an open file in the file system, if the path may be another's by now. f_bavail: space reserved for root is not
    free.
    """
    with spooling(path):
        found = os.statvfs(path if at is None else at)
        free = found.f_bavail * found.f_frsize
        if free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if free - size < keep_free:
        raise SpoolFailed(f'cannot write {path}: {size:,} more bytes would leave {free - size:,} free, but '
                          f'{keep_free:,} must stay free', resource=str(path), phase=phase, hint='free space on the '
                          'file system of the spool (ckptctl remove IMAGE), or lower KeepFree= of ckptd')


def create(path: Path) -> int:
    """Make a file that only the owner may access, open for reading and writing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def wait_writable(fd: int) -> None:
    """Wait for room in a pipe or socket that is O_NONBLOCK."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def sync_directory(path: Path) -> None:
    """Call fsync for a directory, so that names made or changed in it are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_regular(directory: int, name: str) -> int:
    """Open `name` in an open directory for reading. ImageDamaged if it is missing or not a regular file."""
    # O_NONBLOCK: open(2) of a FIFO would wait for ever; regular files ignore the flag
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        reason = 'is missing' if error.errno == errno.ENOENT else f'cannot be opened: {error.strerror}'
        raise ImageDamaged(f'{name} {reason}', resource=name) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageDamaged(f'{name} is not a regular file', resource=name)
    return fd


def digest_file(fd: int, on_bytes: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Return size and sha256 of a whole file. It is read with its own buffer, and the file position stays.

    on_bytes(n) is called after every n bytes, some MiB, for progress and cancel.
    """
    size = max(1, min(_PIECE, os.fstat(fd).st_size))
    hasher, buffer, at, told = hashlib.sha256(), memoryview(bytearray(size)), 0, 0
    while done := os.preadv(fd, [buffer], at):
        hasher.update(buffer[:done])
        at += done
        if on_bytes and at - told >= BUFFER:
            on_bytes(at - told)
            told = at
    if on_bytes and at > told:
        on_bytes(at - told)
    return at, hasher.hexdigest()
