# SPDX-License-Identifier: LGPL-2.1-or-later
"""One end of a FIFO, a pipe with a name (fifo(7)). Its content is kept with the read end."""

import errno
import os
import stat

from ckptd.errors import Busy, CkptError, Finding
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel import pipe
from ckptd.kernel.statfs import PIPEFS_MAGIC
from ckptd.objects.files.base import Content, Endpoint, FileLookup, Kind, Needs, OpenFile, RestoreContext, finding
from ckptd.objects.files.content import owner_findings, set_owner
from ckptd.objects.files.deleted import deleted_findings, flag_findings, make_in_home, unlink_new
from ckptd.objects.files.hidden import hidden_findings
from ckptd.objects.files.pipe import Key, dump_pipe_data, fill, pipe_endpoint, restore_end, set_capacity
from ckptd.objects.support import Support


@layout
class Fifo(Struct):
    """A FIFO. path: from the root of the mount namespace. The other fields are as in Pipe."""
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
    support = Support('FIFOs, with unread bytes', refused='deleted ones that are only referred to',
                      user='the FIFO must be accessible')

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISFIFO(file.stat.st_mode) and not file.is_path and file.magic != PIPEFS_MAGIC

    def findings(self, file: OpenFile) -> list[Finding]:
        # a deleted one is made again, and its ends find each other by inode
        return hidden_findings(file, 'FIFO') or flag_findings(file)

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        return pipe_endpoint('fifo', file)

    def dump(self, file: OpenFile, content: Content) -> Fifo:
        of = file.stat
        with file.duplicate() as fd:
            data, lengths = dump_pipe_data(file, fd, content)
            return Fifo(file.path, of.st_dev, of.st_ino, of.st_mode, of.st_uid, of.st_gid, file.deleted,
                        pipe.capacity(fd), bool(file.flags & os.O_DIRECT), data, lengths)

    def restart_findings(self, record: Fifo, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if record.deleted:
            return [*deleted_findings(record.path, lookup),
                    *owner_findings(record.path, record.uid, record.gid, lookup)]
        found = lookup.lstat(record.path)
        if found is None:
            return [finding('ENOENT', f'{record.path} is missing', 'make the FIFO again (mkfifo)')]
        if not stat.S_ISFIFO(found.st_mode):
            return [finding('ESTALE', f'{record.path} is no longer a FIFO', 'put the FIFO back')]
        # a restart opens it for reading and writing, so that neither end waits for the other
        if not lookup.may(record.path, os.R_OK | os.W_OK):
            return [finding('EACCES', f'{record.path} is not readable and writable', 'run as its owner, or as root')]
        return []

    def needs(self, record: Fifo, saved: SavedFile) -> Needs:
        return Needs(_key(record), pipe=record.capacity)

    def create(self, record: Fifo, saved: SavedFile, ctx: RestoreContext) -> int:
        def make() -> int:
            base = _make_deleted(record, saved, ctx) if record.deleted else _open(record, ctx)
            set_capacity(base, record.capacity)
            return base
        fd = restore_end(_key(record), make, saved.flags, ctx)
        # data that others wrote meanwhile came after the old content, which cannot be put before it
        if record.data and pipe.bytes_in(fd):
            os.close(fd)
            raise Busy(f'{record.path} is in use: it contains data of another program', resource=record.path,
                       hint='read it empty, or end the programs that have it open')
        return fd

    def connect(self, record: Fifo, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        fill(_key(record), fd, record.data, record.lengths, record.path, ctx)


def _key(record: Fifo) -> Key:
    return 'fifo', record.device, record.inode


def _open(record: Fifo, ctx: RestoreContext) -> int:
    """Open the existing FIFO for reading and writing."""
    base = ctx.open(record.path, os.O_RDWR | os.O_NONBLOCK)
    if not stat.S_ISFIFO(os.fstat(base).st_mode):
        os.close(base)
        raise CkptError(f'{record.path} is no longer a FIFO', errno=errno.ESTALE, resource=record.path)
    return base


def _make_deleted(record: Fifo, saved: SavedFile, ctx: RestoreContext) -> int:
    """Open a new FIFO, which has a name for a moment only, for reading and writing."""
    base, of = make_in_home(record.path, ctx, _make_and_open)
    try:
        _require_own(of, record, ctx)
        set_owner(base, saved.mode, record.uid, record.gid, ctx)
    except BaseException:
        os.close(base)
        raise
    return base


def _make_and_open(name: str, home: int) -> tuple[int, os.stat_result]:
    """Make a FIFO in the directory `home` and open whatever then has the name. Return it with its stat from before the
    name was removed."""
    os.mkfifo(name, 0o600, dir_fd=home)
    try:
        base = os.open(name, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=home)
    except BaseException:
        os.unlink(name, dir_fd=home)
        raise
    of = os.fstat(base)
    unlink_new(name, home, base)
    return base, of


def _require_own(of: os.stat_result, record: Fifo, ctx: RestoreContext) -> None:
    """Check that the opened FIFO is ours. No call both makes and opens a FIFO, and a user who may write its directory
    may replace it in between (renameat2(2), RENAME_EXCHANGE) or keep it by another name (link(2))."""
    if not stat.S_ISFIFO(of.st_mode) or of.st_uid != ctx.uid or of.st_nlink != 1:
        raise CkptError(f'{record.path} was replaced while it was made again', errno=errno.ESTALE,
                        resource=record.path, hint='find out which other program writes in its directory')
