# SPDX-License-Identifier: LGPL-2.1-or-later
"""One end of a pipe (pipe(7)). Its content is kept with the read end, whose holder would have read it.

A restart makes each pipe once, with a base fd that is both ends. The ends in the tree are further descriptions of it.
The base is closed at the end of the restart, so an end whose other ends were outside of the tree then reads
end-of-file.
"""

import errno
import fcntl
import os
import select
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ckptd.errors import CkptError, Finding, ImageDamaged
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel import pipe
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.statfs import PIPEFS_MAGIC
from ckptd.objects.files.base import (
    O_LARGEFILE,
    Content,
    Endpoint,
    FileEnd,
    FileLookup,
    Kind,
    Needs,
    OpenFile,
    RestoreContext,
    finding,
    open_again,
)
from ckptd.objects.files.content import owner_findings, set_owner
from ckptd.objects.files.inherited import asked_for
from ckptd.objects.files.tables import JobTables
from ckptd.objects.support import Support

Key = tuple[str, int, int]


@layout
class Pipe(Struct):
    """A pipe.

    inode: equal for all ends of one pipe. capacity: F_GETPIPE_SZ. data: in order, for a read end only. lengths: of each
    write (or packet), so that a packet-mode pipe keeps its packets.
    """
    inode: U64
    capacity: U32
    packet_mode: U8
    uid: U32
    gid: U32
    data: tuple[Extent, ...]
    lengths: tuple[U32, ...]


class PipeKind(Kind[Pipe], tag='pipe'):
    support = Support('pipes, with unread bytes', refused='that of an automounter (autofs)',
                      warned='an end that a process outside of the tree holds: it is closed after a restart, or '
                             'handed over',
                      user='a capacity above pipe-max-size is refused')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._inherited: set[int] = set()       # inodes

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISFIFO(file.stat.st_mode) and not file.is_path and file.magic == PIPEFS_MAGIC

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        return pipe_endpoint('pipe', file)

    def link(self, ends: Sequence[FileEnd], *, is_whole: bool) -> Iterator[tuple[FileEnd, Finding]]:
        for end, row in super().link(ends, is_whole=is_whole):
            inode = end.file.stat.st_ino
            if self._tables.external.inherits(_name(inode)):
                self._inherited.add(inode)
                row = replace(row, hint=asked_for(_name(inode)))
            elif _is_automounters(end.file):
                row = finding('EOPNOTSUPP', f'{end.file.link} is the pipe on which the driver autofs asks for mounts',
                              'stop the automounter first, as mounts wait for its answers')
            yield end, row

    def inherited(self, file: OpenFile) -> str:
        return _name(file.stat.st_ino) if file.stat.st_ino in self._inherited else ''

    def dump(self, file: OpenFile, content: Content) -> Pipe:
        with file.duplicate() as fd:
            data, lengths = dump_pipe_data(file, fd, content)
            return Pipe(file.stat.st_ino, pipe.capacity(fd), bool(file.flags & os.O_DIRECT), file.stat.st_uid,
                        file.stat.st_gid, data, lengths)

    def restart_findings(self, record: Pipe, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        return owner_findings(_name(record.inode), record.uid, record.gid, lookup)

    def needs(self, record: Pipe, saved: SavedFile) -> Needs:
        return Needs(('pipe', 0, record.inode), pipe=record.capacity)

    def create(self, record: Pipe, saved: SavedFile, ctx: RestoreContext) -> int:
        def make() -> int:
            base = make_pipe(key, ctx)
            try:
                set_capacity(base, record.capacity)
                set_owner(base, saved.mode, record.uid, record.gid, ctx)
            except BaseException:
                os.close(base)
                raise
            return base
        key = ('pipe', 0, record.inode)
        return restore_end(key, make, saved.flags, ctx)

    def connect(self, record: Pipe, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        fill(('pipe', 0, record.inode), fd, record.data, record.lengths, saved.link, ctx)


def _name(inode: int) -> str:
    """Return the name of a pipe in /proc and in policies."""
    return f'pipe:[{inode}]'


def pipe_endpoint(name: str, file: OpenFile) -> Endpoint:
    """Return the ends that `file` is, and the one that it is not if that is open elsewhere."""
    holds = frozenset(end for end, is_it in (('read', file.readable), ('write', file.writable)) if is_it)
    with file.duplicate() as fd:
        others = {'read', 'write'} - holds if pipe.other_end_open(fd) else set()
    return Endpoint((name, file.stat.st_dev, file.stat.st_ino), holds, frozenset(others))


def dump_pipe_data(file: OpenFile, fd: int, content: Content) -> tuple[tuple[Extent, ...], tuple[int, ...]]:
    """Dump the unread bytes of a pipe or FIFO, with the length of each packet or buffer; nothing for a write end."""
    if not file.readable:
        return (), ()
    chunks = list(pipe.peek(fd))
    if sum(map(len, chunks)) != pipe.bytes_in(fd):
        raise BlockingIOError(errno.EAGAIN, f'{file.link} of task {file.pid} was written to while it was dumped')
    return ((content.add(chunks),) if chunks else ()), tuple(map(len, chunks))


# ---------------------------------------------------------------- restart

def make_pipe(key: Key, ctx: RestoreContext) -> int:
    """Return both ends of a new pipe as one description. The two of pipe(2) are kept for the first that ask for
    them."""
    with ctx.as_user():
        read, write = os.pipe2(os.O_CLOEXEC)
        base = open_again(read, os.O_RDWR | os.O_NONBLOCK)
    ctx.once((*key, 'first', os.O_RDONLY), lambda: read)
    ctx.once((*key, 'first', os.O_WRONLY), lambda: write)
    return base


def set_capacity(fd: int, capacity: int) -> None:
    if pipe.capacity(fd) == capacity:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, capacity)
    except PermissionError as error:
        raise CkptError(f'a pipe of {capacity:,} bytes is not allowed', errno=errno.EPERM,
                        hint='raise the sysctl fs.pipe-max-size, or run as root') from error


def restore_end(key: Key, make: Callable[[], int], flags: int, ctx: RestoreContext) -> int:
    """Open an end of the pipe. `make` makes the pipe unless another end has done so."""
    base = ctx.once(key, make)
    fd = _end(key, base, flags, ctx)
    # open(2) of a pipe does not accept O_DIRECT, and owners of signals come later
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_ASYNC)
    if flags & os.O_DIRECT and flags & os.O_ACCMODE != os.O_RDONLY:
        # the mark for `fill` that the pipe contained packets
        ctx.once((*key, 'packets'), lambda: _writer(base, packets=True))
    return fd


def _end(key: Key, base: int, flags: int, ctx: RestoreContext) -> int:
    """Return a description for the tree. open(2) sets O_LARGEFILE for good, pipe(2) does not. So the first plain ends
    are those of pipe(2), and the program still gets the same flags from fcntl(2) F_GETFL."""
    fresh: list[int] = []

    def take() -> int:
        fresh.append(os.dup(base))
        return fresh[0]
    mode = flags & os.O_ACCMODE
    if mode != os.O_RDWR and key[0] == 'pipe' and not flags & O_LARGEFILE:
        ctx.once((*key, 'taken', mode), take)
    if fresh:
        return os.dup(ctx.once((*key, 'first', mode), lambda: base))
    # opening one end waits for the other, which the base is; O_SYNC and O_DSYNC are set by open(2) only
    return open_again(base, mode | os.O_NONBLOCK | flags & os.O_SYNC)


def _writer(fd: int, *, packets: bool) -> int:
    writer = open_again(fd, os.O_WRONLY | os.O_NONBLOCK)
    if packets:
        fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
    return writer


def fill(key: Key, fd: int, data: Sequence[Extent], lengths: Sequence[int], link: str, ctx: RestoreContext) -> None:
    """Write the content into a pipe by any end of it, once, when all ends exist: several may have been dumped with
    it."""
    if not data:
        return

    def write() -> int:
        plain = _writer(fd, packets=False)
        try:
            # several lengths are packets: pipe.peek returns other content in one piece
            packets = ctx.once((*key, 'packets'), lambda: _writer(fd, packets=len(lengths) > 1))
            for chunk in _chunks(data, lengths, pipe.capacity(fd), link, ctx):
                # a packet has at most PIPE_BUF bytes (pipe(7)), so a longer piece is not a packet
                _write(packets if len(chunk) <= select.PIPE_BUF else plain, chunk, link)
        except BaseException:
            os.close(plain)
            raise
        return plain
    ctx.once((*key, 'content'), write)


def _write(fd: int, chunk: bytes, link: str) -> None:
    try:
        done = os.write(fd, chunk)
    except BlockingIOError:
        done = 0
    if done != len(chunk):
        raise CkptError(f'{link} does not accept all of its former content', errno=errno.ENOSPC, resource=link)


def _chunks(data: Sequence[Extent], lengths: Sequence[int], room: int, link: str,
            ctx: RestoreContext) -> Iterator[bytes]:
    size = sum(lengths)
    if sum(extent.length for extent in data) != size:
        raise ImageDamaged(f'{link}: the length of its content differs from that of its packets', resource=link)
    if size > room:
        raise ImageDamaged(f'{link}: a pipe of {room:,} bytes cannot contain {size:,}', resource=link)
    content = b''.join(ctx.pread(extent, extent.length, 0) for extent in data)
    at = 0
    for length in lengths:
        yield content[at:at + length]
        at += length


def _is_automounters(file: OpenFile) -> bool:
    """Whether the kernel writes to a pipe for a mount of autofs, whose options show its inode
    (fs/autofs/inode.c, autofs_show_options)."""
    wanted = f'pipe_ino={file.stat.st_ino}'
    return any(mount.fs_type == 'autofs' and wanted in mount.super_options for mount in read_mountinfo(file.tid))
