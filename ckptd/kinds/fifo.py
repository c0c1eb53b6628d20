# SPDX-License-Identifier: LGPL-2.1-or-later
"""One end of a FIFO, a pipe with a name, fifo(7). What is in it goes with the read end."""

import os
import stat

from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import Extent
from ckptd.kernel import pipe
from ckptd.kernel.statfs import PIPEFS_MAGIC
from ckptd.kinds.base import Content, Endpoint, Kind, OpenFile, Reason
from ckptd.kinds.pipe import dump_pipe_data, pipe_endpoint


@layout
class Fifo(Struct):
    """path: from the root of the mount namespace. The rest as in Pipe."""
    path: str
    device: U64
    inode: U64
    mode: U32
    uid: U32
    gid: U32
    deleted: U8
    capacity: U32
    packet_mode: U8
    data: tuple[Extent, ...]
    lengths: tuple[U32, ...]


class FifoKind(Kind[Fifo], tag='fifo'):

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISFIFO(file.stat.st_mode) and not file.is_path and file.magic != PIPEFS_MAGIC

    def refusals(self, file: OpenFile) -> list[Reason]:
        if file.deleted or file.reachable:      # a deleted one is made again, its ends find each other by inode
            return []
        return [Reason('ENOENT', f'{file.path} is another file now, or covered by a mount',
                       'a restart opens FIFOs by path: put it back', 'warning')]

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        return pipe_endpoint('fifo', file)

    def dump(self, file: OpenFile, content: Content) -> Fifo:
        of = file.stat
        with file.duplicate() as fd:
            data, lengths = dump_pipe_data(file, fd, content)
            return Fifo(file.path, of.st_dev, of.st_ino, of.st_mode, of.st_uid, of.st_gid, file.deleted,
                        pipe.capacity(fd), bool(file.flags & os.O_DIRECT), data, lengths)
