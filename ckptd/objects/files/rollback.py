# SPDX-License-Identifier: LGPL-2.1-or-later
"""Roll back a file that has changed since the checkpoint to its former content.

If its content is in the image (checkpoint --save-files), any change can be rolled back. Otherwise it must only have
been appended to: the image has a digest of its former last bytes, and everything behind them is cut off.
"""

import errno
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress

from ckptd.errors import CkptError
from ckptd.image.identity import FileIdentity
from ckptd.kernel.copyrange import zero_range
from ckptd.kernel.statfs import MADE_UP, file_system
from ckptd.objects.files.base import FileLookup, RestoreContext
from ckptd.objects.files.content import ContentSegment

TAIL = 64 << 10     # bytes that the digest covers


def digest_tail(fd: int, size: int) -> bytes:
    """Return the digest of the last TAIL bytes before `size`; b'' if there are fewer, because the file is shorter
    now."""
    length = min(TAIL, size)
    data = os.pread(fd, length, size - length)
    return hashlib.blake2b(data, digest_size=16).digest() if len(data) == length else b''


def only_appended(path: str, saved: FileIdentity, tail: bytes, found: os.stat_result, lookup: FileLookup) -> bool:
    """Whether the file still has the same bytes before its former end."""
    if not tail or found.st_ino != saved.inode or found.st_size < saved.size:
        return False
    try:
        fd = lookup.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return digest_tail(fd, saved.size) == tail
    finally:
        os.close(fd)


def roll_back(path: str, saved: FileIdentity, content: Sequence[ContentSegment] | None, tail: bytes, fd: int,
              ctx: RestoreContext) -> None:
    """Restore the file, including its modification time. With content None, cut off everything that was appended.
    CkptError."""
    # not the tree's own description: it may be for appending only, where pwrite(2) ignores the offset
    mine = ctx.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        found = os.fstat(mine)
        if not os.path.samestat(found, os.fstat(fd)):
            raise CkptError(f'{path} was replaced during the restart', errno=errno.ESTALE, resource=path)
        if (found.st_size, found.st_mtime_ns) == (saved.size, saved.mtime):
            return      # done already by another description of the same file
        if file_system(f'/proc/self/fd/{mine}') in MADE_UP:
            raise CkptError(f'{path} is on a file system without stored content now', errno=errno.ESTALE, resource=path)
        if content is not None:
            ctx.keep(path, mine, 0)
            # with the user's rights, because a write with CAP_FSETID leaves set-user-ID in place (capabilities(7))
            with ctx.as_user():
                _put_back(mine, saved.size, content, ctx)
        elif found.st_size >= saved.size and digest_tail(mine, saved.size) == tail:
            ctx.keep(path, mine, saved.size)
            with ctx.as_user():
                os.ftruncate(mine, saved.size)
        else:
            raise CkptError(f'{path} has changed further during the restart', errno=errno.ESTALE, resource=path)
        _set_time(mine, (found.st_atime_ns, saved.mtime), ctx)
    except OSError as error:
        raise CkptError(f'cannot roll back {path}: {error.strerror}', errno=error.errno, resource=path,
                        hint='free space on its file system and in the spool, or use --changed-files=accept') from error
    finally:
        os.close(mine)


def _set_time(fd: int, times: tuple[int, int], ctx: RestoreContext) -> None:
    """Set the times. Only the owner may (utimensat(2)), and a writer need not be the owner: then the modification time
    is now."""
    with suppress(PermissionError):
        with ctx.as_user():
            os.utime(fd, ns=times)
        return
    if ctx.by_root:
        os.utime(fd, ns=times)


def _put_back(fd: int, size: int, content: Sequence[ContentSegment], ctx: RestoreContext) -> None:
    """Reserve all needed space first: it is better to find a full disk before a byte is changed."""
    for segment in content:
        os.posix_fallocate(fd, segment.start, segment.extent.length)
    for segment in content:
        ctx.copy(segment.extent, fd, segment.start)
    _zero_between([(segment.start, segment.start + segment.extent.length) for segment in content], fd, size)
    os.ftruncate(fd, size)


def _zero_between(ranges: Sequence[tuple[int, int]], fd: int, size: int) -> None:
    """Make holes of everything in the file's first `size` bytes that no range covers."""
    end = min(size, os.fstat(fd).st_size)
    at = 0
    for start, stop in (*ranges, (end, end)):
        if at < min(start, end):
            zero_range(fd, at, min(start, end))
        at = max(at, stop)
