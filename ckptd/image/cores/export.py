# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write cores into a file, a directory, or a tar stream. Holes stay holes, and one megabyte of memory is enough.

A tar stream has cores in GNU sparse format 1.0 of POSIX (pax) archives, which GNU tar, libarchive and Python's tarfile
unpack into sparse files. A member is a header, then as decimal lines the number of pieces and the offset and length of
each, padded to 512 bytes, then the pieces, each padded likewise. See "Storing Sparse Files" in the manual of GNU tar.
"""

import errno
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ckptd.errors import CkptError
from ckptd.image.cores.plan import Core, exportable, plan_core
from ckptd.image.files import wait_writable
from ckptd.image.reader import ImageReader

_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_HINTS = {
    errno.ENOSPC: 'free space there or export to another place; it takes what the memory of the tree takes',
    errno.EFBIG: 'export to a file system that takes larger (sparse) files',
    errno.EEXIST: 'remove the old cores or export to another directory',
    errno.EPIPE: 'the reader of the stream went away',
}


@contextmanager
def writing(name: str) -> Iterator[None]:
    """Convert an OSError of the body to a CkptError that says what could not be written and what to do."""
    try:
        yield
    except OSError as error:
        number = error.errno or errno.EIO
        raise CkptError(f'cannot write {name}: {os.strerror(number)}', errno=number, resource=name, phase='export',
                        hint=_HINTS.get(number)) from error


def _write(out: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        done = out.write(view)      # an unbuffered file may take less at a time, or None where it would wait
        if done is None:
            wait_writable(out.fileno())
        else:
            view = view[done:]


def core_name(vpid: int) -> str:
    """Return the file name of the core of a process."""
    return f'core.{vpid}'


def write_core(reader: ImageReader, vpid: int, out: BinaryIO) -> None:
    """Write the core of one process to an empty seekable file. NoSuchTarget, ImageDamaged; CkptError on a full disk."""
    core = plan_core(reader, vpid)
    with writing(core_name(vpid)):
        base = out.tell()
        for at, chunk in _chunks(core):
            out.seek(base + at)     # skipped bytes become a hole
            _write(out, chunk)
        out.flush()
        out.truncate(base + core.size)


def export(reader: ImageReader, sink: Path | BinaryIO) -> list[str]:
    """Write a core of every process that had memory. Return their names. sink: a directory, or the file for a tar
    stream."""
    vpids = exportable(reader)
    if isinstance(sink, Path):
        for vpid in vpids:
            _export_file(reader, vpid, sink / core_name(vpid))
    else:
        for vpid in vpids:
            with writing('the tar stream'):
                _export_member(reader, vpid, sink)
        with writing('the tar stream'):
            _write(sink, bytes(2 * _BLOCK))
            sink.flush()
    return [core_name(vpid) for vpid in vpids]


def _export_file(reader: ImageReader, vpid: int, path: Path) -> None:
    with writing(str(path)):
        # a core is as secret as the memory in it, so it is never written through an existing link
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with writing(str(path)), os.fdopen(fd, 'wb') as out:
            write_core(reader, vpid, out)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _chunks(core: Core) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset in the core, bytes) in ascending order. The bytes are valid until the next one."""
    yield 0, memoryview(core.head)
    buffer = memoryview(bytearray(_CHUNK))
    for piece in core.pieces():
        for done in range(0, piece.length, _CHUNK):
            chunk = buffer[:min(_CHUNK, piece.length - done)]
            piece.source.read_into(chunk, piece.offset + done)
            yield piece.at + done, chunk


# ---------------------------------------------------------------- tar

def _export_member(reader: ImageReader, vpid: int, out: BinaryIO) -> None:
    core = plan_core(reader, vpid)
    extents = _extents(core)
    table = _sparse_map(extents)
    length = sum(length for _, length in extents)
    info = tarfile.TarInfo(f'./GNUSparseFile.0/{core_name(vpid)}')
    info.size, info.mode = len(table) + length, 0o600
    info.mtime = reader.manifest.created_usec // 1_000_000
    info.uid, info.gid = reader.manifest.owner_uid, reader.manifest.owner_gid
    info.pax_headers = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.name': core_name(vpid),
                        'GNU.sparse.realsize': str(core.size)}
    _write(out, info.tobuf(tarfile.PAX_FORMAT) + table)
    for _, chunk in _chunks(core):
        _write(out, chunk)
        _write(out, bytes(-len(chunk) % _BLOCK))


def _extents(core: Core) -> list[tuple[int, int]]:
    """Return (offset, length) of all parts that are not holes. The last one is empty and marks the end of the file, as
    in GNU tar."""
    # GNU tar reads whole blocks of each piece, others read all pieces in a row. Padding that counts as content suits
    # both. Pieces begin at pages, so the added bytes are zero in the core.
    extents = [(0, _blocks(len(core.head)))]
    for piece in core.pieces():
        at, length = extents[-1]
        if at + length == piece.at:
            extents[-1] = at, length + _blocks(piece.length)
        else:
            extents.append((piece.at, _blocks(piece.length)))
    return [*extents, (core.size, 0)]


def _blocks(length: int) -> int:
    return length + -length % _BLOCK


def _sparse_map(extents: Sequence[tuple[int, int]]) -> bytes:
    text = b''.join([b'%d\n' % len(extents), *(b'%d\n%d\n' % extent for extent in extents)])
    return text + bytes(-len(text) % _BLOCK)
