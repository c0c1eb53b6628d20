# SPDX-License-Identifier: LGPL-2.1-or-later
"""One end of a pipe, pipe(7). What is in it goes with the read end, whose holder would have read it."""

import errno
import os
import stat

from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import Extent
from ckptd.kernel import pipe
from ckptd.kernel.statfs import PIPEFS_MAGIC
from ckptd.kinds.base import Content, Endpoint, Kind, OpenFile


@layout
class Pipe(Struct):
    """inode: equal for all ends of one pipe. capacity: F_GETPIPE_SZ. data: in order, of a read end only; a write
    (or packet) each in `lengths`, so that a packet-mode pipe keeps its packets."""
    inode: U64
    capacity: U32
    packet_mode: U8
    uid: U32
    gid: U32
    data: tuple[Extent, ...]
    lengths: tuple[U32, ...]


class PipeKind(Kind[Pipe], tag='pipe'):

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISFIFO(file.stat.st_mode) and not file.is_path and file.magic == PIPEFS_MAGIC

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        return pipe_endpoint('pipe', file)

    def dump(self, file: OpenFile, content: Content) -> Pipe:
        with file.duplicate() as fd:
            data, lengths = dump_pipe_data(file, fd, content)
            return Pipe(file.stat.st_ino, pipe.capacity(fd), bool(file.flags & os.O_DIRECT), file.stat.st_uid,
                        file.stat.st_gid, data, lengths)


def pipe_endpoint(name: str, file: OpenFile) -> Endpoint:
    """The ends that `file` is, and the one that it is not if somebody has that open."""
    holds = frozenset(end for end, is_it in (('read', file.readable), ('write', file.writable)) if is_it)
    with file.duplicate() as fd:
        others = {'read', 'write'} - holds if pipe.other_end_open(fd) else set()
    return Endpoint((name, file.stat.st_dev, file.stat.st_ino), holds, frozenset(others))


def dump_pipe_data(file: OpenFile, fd: int, content: Content) -> tuple[tuple[Extent, ...], tuple[int, ...]]:
    """The unread bytes of a pipe or FIFO and the length of each packet or buffer; nothing for a write end."""
    if not file.readable:
        return (), ()
    chunks = list(pipe.peek(fd))
    if sum(map(len, chunks)) != pipe.bytes_in(fd):
        raise BlockingIOError(errno.EAGAIN, f'{file.link} of task {file.pid} is being written to while it is dumped')
    return ((content.add(chunks),) if chunks else ()), tuple(map(len, chunks))
