# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bulk bytes of a file that a restart could not find by its name, without holes."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from ckptd.errors import Finding
from ckptd.image.grammar import U64, Struct, layout
from ckptd.image.records import Extent
from ckptd.kernel.copyrange import data_ranges
from ckptd.objects.files.base import ByUser, Content, FileLookup, FileMaking, OpenFile, finding

CHUNK = 1 << 20


@layout
class ContentSegment(Struct):
    """Bytes of a file from `start`, kept in `extent`. Everything outside of the segments is zero."""
    start: U64
    extent: Extent


def dump_content(fd: int, size: int, content: Content) -> tuple[ContentSegment, ...]:
    """Dump the data of a file of `size` bytes, by a description of our own, because SEEK_DATA moves the position."""
    return tuple(ContentSegment(start, content.add(_chunks(fd, start, end))) for start, end in data_ranges(fd, size))


@contextmanager
def open_quietly(file: OpenFile) -> Iterator[int]:
    """Open a description of our own to read a named file. Its access time does not change if we have that right
    (open(2))."""
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(file.reopen(os.O_RDONLY | os.O_NOATIME))
        except PermissionError:
            fd = stack.enter_context(file.reopen(os.O_RDONLY))
        yield fd


def content_size(segments: Iterable[ContentSegment]) -> int:
    """Return the bytes that are written, each as often as a segment has it."""
    return sum(segment.extent.length for segment in segments)


def restore_content(fd: int, size: int, segments: Iterable[ContentSegment], ctx: FileMaking) -> None:
    """Write the data into a new file."""
    for segment in segments:
        ctx.copy(segment.extent, fd, segment.start)
    # the end of the file may be a hole; and a segment may have been longer than the file, by pages
    os.ftruncate(fd, size)


def set_owner(fd: int, mode: int, uid: int, gid: int, user: ByUser) -> None:
    """Set owner and permissions of a new file, which was made with the user's rights, with these rights.

    An image may name any owner, and a name that others can change may lead to any file, so the kernel decides what the
    user may do. If the user may not give the file away, it stays theirs, without set-user-ID and set-group-ID. The plan
    has warned about that, see `owner_findings`.
    """
    of, mode = os.fstat(fd), stat.S_IMODE(mode)
    # a socket has no name, and is root's if root made it: a service may have set its mode before it gave up its rights
    with nullcontext() if user.by_root and stat.S_ISSOCK(of.st_mode) else user.as_user():
        if (of.st_uid, of.st_gid) != (uid, gid):
            try:
                os.fchown(fd, uid, gid)     # this clears set-user-ID, so the mode is set afterwards
            except PermissionError:
                mode &= 0o777
        if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            os.fchmod(fd, mode)


def owner_findings(what: str, uid: int, gid: int, lookup: FileLookup) -> list[Finding]:
    """Return a warning if a file that is made again does not get its former owner or group."""
    if lookup.may_own(uid, gid):
        return []
    return [finding('EPERM', f'{what} belonged to uid {uid} and gid {gid}, which uid {lookup.uid} may not give it',
                    'it then belongs to that user; processes that have it open do not notice', 'warning')]


def unread_findings(file: OpenFile) -> list[Finding]:
    """Return a refusal if the content of a file without a name must not get into the image."""
    if not file.unread and os.access(file.proc_path, os.R_OK, effective_ids=True):
        return []
    return [finding('EACCES', f'the content of {file.path} is not readable', 'run as root')]


def socket_findings(link: str, uid: int, gid: int, lookup: FileLookup) -> list[Finding]:
    """Return the same warning about a socket, whose owner root may always set, see `set_owner`."""
    return [] if lookup.by_root else owner_findings(link, uid, gid, lookup)


def _chunks(fd: int, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        chunk = os.pread(fd, min(CHUNK, end - start), start)
        if not chunk:       # truncated meanwhile, from outside of the tree
            return
        start += len(chunk)
        yield chunk
