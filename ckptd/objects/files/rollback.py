# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file that went on living after the checkpoint, brought back to what it was.

With its content in the image (checkpoint --save-files) whatever was done to it; without, if it was only appended to:
the image has a digest of the last bytes that it had, and what is behind them is cut off.
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

TAIL = 64 << 10     # bytes that the digest is of


def digest_tail(fd: int, size: int) -> bytes:
    """Of the last TAIL bytes before `size`; b'' if there are fewer, as the file is shorter by now."""
    length = min(TAIL, size)
    data = os.pread(fd, length, size - length)
    return hashlib.blake2b(data, digest_size=16).digest() if len(data) == length else b''


def only_appended(path: str, saved: FileIdentity, tail: bytes, found: os.stat_result, lookup: FileLookup) -> bool:
    """Whether the bytes before the size that it had end as they did."""
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
    """Make the file what it was, its time of change included; content None: cut off what was appended. CkptError."""
    # not the tree's own description: it may be for appending only, and pwrite(2) heeds no offset then
    mine = ctx.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        found = os.fstat(mine)
        if not os.path.samestat(found, os.fstat(fd)):
            raise CkptError(f'{path} was replaced during the restart', errno=errno.ESTALE, resource=path)
        if (found.st_size, found.st_mtime_ns) == (saved.size, saved.mtime):
            return      # by another description of the same file
        if file_system(f'/proc/self/fd/{mine}') in MADE_UP:
            raise CkptError(f'{path} is on a file system that keeps no content now', errno=errno.ESTALE, resource=path)
        if content is not None:
            ctx.keep(path, mine, 0)
            # by the user's rights, as a write by CAP_FSETID leaves set-user-ID in place, capabilities(7)
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
        raise CkptError(f'{path} cannot be put back as it was: {error.strerror}', errno=error.errno, resource=path,
                        hint='free space on its file system and in the spool, or use --changed-files=accept') from error
    finally:
        os.close(mine)


def _set_time(fd: int, times: tuple[int, int], ctx: RestoreContext) -> None:
    """The owner's right, utimensat(2), and a writer need not be the owner: then the time of change is now."""
    with suppress(PermissionError):
        with ctx.as_user():
            os.utime(fd, ns=times)
        return
    if ctx.by_root:
        os.utime(fd, ns=times)


def _put_back(fd: int, size: int, content: Sequence[ContentSegment], ctx: RestoreContext) -> None:
    """All the room that is needed first: a full disk is better found before a byte is changed."""
    for segment in content:
        os.posix_fallocate(fd, segment.start, segment.extent.length)
    for segment in content:
        ctx.copy(segment.extent, fd, segment.start)
    _zero_between([(segment.start, segment.start + segment.extent.length) for segment in content], fd, size)
    os.ftruncate(fd, size)


def _zero_between(ranges: Sequence[tuple[int, int]], fd: int, size: int) -> None:
    """Whatever of the file's first `size` bytes no range covers is to be a hole."""
    end = min(size, os.fstat(fd).st_size)
    at = 0
    for start, stop in (*ranges, (end, end)):
        if at < min(start, end):
            zero_range(fd, at, min(start, end))
        at = max(at, stop)
