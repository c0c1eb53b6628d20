# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write an image as a tar stream, out of the spool. unpack.py reads it back in.

    20240131_235959_sleep_3fa9/                 0700, so that it is private where it is unpacked
    20240131_235959_sleep_3fa9/manifest.json    first: it lists what follows
    20240131_235959_sleep_3fa9/tree.img         then tasks.img, files.img, memory.img, data-0.img, data-1.img ...
    two blocks of zeros

It is a ustar archive. A part of 8 GiB or more has a pax record `size` before it (pax(1)). The sink may be a pipe or a
socket: it is never seeked, and the kernel moves the bytes (sendfile(2)).
"""

import errno
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ckptd.errors import ImageDamaged
from ckptd.image.cores.export import writing
from ckptd.image.files import wait_writable
from ckptd.image.manifest import NAME, Manifest, read_manifest_of
from ckptd.image.records import PARTS
from ckptd.image.source import ImageFiles, files_of

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20
_MOST = 1 << 30         # bytes per call of sendfile(2)


def part_order(names: Iterable[str]) -> list[str]:
    """Return the names of parts in the order of an archive: records first, then data by number."""
    known = list(PARTS.values())
    return sorted(names, key=lambda name: (known.index(name), 0) if name in known else
                  (len(known), int(name.removeprefix('data-').removesuffix('.img'))))


def write_archive(image: Path | ImageFiles, sink: int) -> list[str]:
    """Write an image to an fd. Return the names of its files in the stream. ImageDamaged; CkptError for the sink.

    Digests are not checked here, but by the receiver of the stream. Sizes are checked before anything is written.
    """
    with files_of(image) as files:
        manifest = read_manifest_of(files)
        sizes = _sizes(files, manifest)
        with writing('the tar stream'):
            _write(sink, _header(manifest, f'{manifest.image}/', tarfile.DIRTYPE, 0o700))
            for name, size in sizes.items():
                _write(sink, _header(manifest, f'{manifest.image}/{name}', tarfile.REGTYPE, 0o600, size))
                _send_file(sink, files, name, size)
                _write(sink, bytes(-size % BLOCK))
            _write(sink, bytes(2 * BLOCK))
    return [f'{manifest.image}/{name}' for name in sizes]


def _sizes(files: ImageFiles, manifest: Manifest) -> dict[str, int]:
    """Return bytes by file name, in the order of the archive. ImageDamaged if a part has a wrong size."""
    sizes = {}
    for name in (NAME, *part_order(manifest.parts)):
        fd = files.open(name)
        try:
            sizes[name] = os.fstat(fd).st_size
        finally:
            os.close(fd)
        part = manifest.parts.get(name)
        if part is not None and sizes[name] != part.size:
            raise ImageDamaged(f'{name} has {sizes[name]} bytes, not {part.size}', resource=name)
    return sizes


def _header(manifest: Manifest, name: str, kind: bytes, mode: int, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, mode, size
    info.mtime = manifest.created_usec // 1_000_000
    return info.tobuf(tarfile.PAX_FORMAT)


def _send_file(sink: int, files: ImageFiles, name: str, size: int) -> None:
    fd = files.open(name)
    try:
        at = 0
        while at < size:
            done = _send(sink, fd, at, size - at)
            if not done:
                raise ImageDamaged(f'{name} ends at byte {at} of {size}', resource=name)
            at += done
    finally:
        os.close(fd)


def _send(sink: int, fd: int, at: int, length: int) -> int:
    try:
        return _patiently(sink, os.sendfile, sink, fd, at, min(length, _MOST))
    except OSError as error:
        # a sink that is open for appending (sendfile(2)), or one that supports write(2) only
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
    data = os.pread(fd, min(length, CHUNK), at)
    _write(sink, data)
    return len(data)


def _write(sink: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[_patiently(sink, os.write, sink, view):]


def _patiently(sink: int, call: Callable[..., int], *args: Any) -> int:
    """Make a call that waits for room, even if the caller's fd does not (O_NONBLOCK)."""
    while True:
        try:
            return call(*args)
        except BlockingIOError:
            wait_writable(sink)
