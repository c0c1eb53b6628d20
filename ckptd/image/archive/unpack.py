# SPDX-License-Identifier: LGPL-2.1-or-later
"""Import an image into the spool from a tar stream, which may come from anyone. A failed import leaves nothing.

It accepts only what pack.py writes, and what other tars make of the same files: ustar, GNU and pax headers, one top
directory or none, padding at the end. Everything else is ImageDamaged: a member that is not part of an image or comes
twice, a link, a device, a sparse file, a size other than in the manifest, an end that is too early or too late.

    manifest.json       at most MAX_MANIFEST; lists the parts that may follow, and their sizes
    parts               in any order, into SPOOL/.incoming-IMAGE, which is made only now
    verify              digests, grammar, references: no damage at all
    manifest            sealed again: other owner, imported, usually another id

Memory: a chunk, the manifest, and a pax header of at most MAX_PAX. Only `verify` needs more, in the worst case twenty
times the size of the records, and gets MEMORY at most.
"""

import errno
import os
import resource
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from ckptd.errors import CkptError, ImageDamaged, LimitsExceeded, SpoolFailed
from ckptd.fileio import write_all
from ckptd.image.archive.pack import BLOCK, CHUNK
from ckptd.image.files import create, require_room, spool_failed, spooling
from ckptd.image.ids import is_image_id, other_image_id
from ckptd.image.manifest import MAX_MANIFEST, NAME, Manifest, decode_manifest
from ckptd.image.source import DirectoryFiles
from ckptd.image.verify import verify
from ckptd.image.writer import Destination, Incoming

MAX_PAX = 8 << 10           # bytes of one pax header: times and names have some hundred
MAX_PADDING = 1 << 20       # zeros behind the end: tar(1) fills a record, 10 KiB by default
MEMORY = 1 << 30            # bytes that the process may use for `verify`
_TRIES = 16                 # ids
_HINT = 'send the complete, uncompressed output of "ckptctl export --format tar"'
_IGNORED = frozenset(('mtime', 'atime', 'ctime', 'uid', 'gid', 'uname', 'gname', 'comment'))     # pax records


Place = TypeVar('Place', bound=Incoming)


class Watcher(Protocol):
    """A listener to the progress. An error that it raises ends the import, and nothing is left."""
    def phase(self, name: str) -> None: ...                     # 'receive', 'verify', 'publish'
    def wait_readable(self, fd: int) -> None: ...               # readable, or at its end
    def progress(self, done: int, total: int) -> None: ...      # bytes of this phase


def read_archive(fd: int, destination: Callable[[Manifest], Destination], uid: int, gid: int, limit: int,
                 watcher: Watcher, keep_free: int = 0) -> Manifest:
    """Import the image that comes from `fd`, up to end-of-file. Return the manifest that it has in the spool.

    destination: makes the directory for an image, see `incoming`. uid, gid: its new owner. limit: bytes of all parts.
    keep_free: bytes of the file system that must stay free, even if others write meanwhile.

    ImageDamaged, LimitsExceeded, SpoolFailed; CkptError if the fd cannot be read.
    """
    watcher.phase('receive')
    archive = _Archive(_Stream(fd, watcher))
    manifest = archive.manifest()
    if manifest.size > limit:
        raise LimitsExceeded(f'the image has {manifest.size} bytes, {limit} are allowed', resource=manifest.image,
                             hint='remove images (ckptctl remove IMAGE), or allow more')
    with destination(manifest) as place:
        manifest = msgspec.structs.replace(manifest, image=place.image, owner_uid=uid, owner_gid=gid, imported=True)
        archive.receive(place.path, manifest, watcher, keep_free)
        watcher.phase('verify')
        place.write_manifest(manifest)
        _verify(place.path, manifest, watcher)
        watcher.phase('publish')
        place.show()
    return manifest


def _damaged(words: str) -> ImageDamaged:
    return ImageDamaged(f'the stream is not an image: {words}', hint=_HINT)


class _Stream:
    """The bytes of the fd, read once and in order."""

    def __init__(self, fd: int, watcher: Watcher) -> None:
        self._fd, self._watcher = fd, watcher
        self._buffer = memoryview(bytearray(CHUNK))
        self.at = 0

    def some(self, most: int) -> memoryview:
        """Read at least one byte, valid until the next call; none at the end."""
        while True:
            self._watcher.wait_readable(self._fd)
            try:
                done = os.readv(self._fd, [self._buffer[:most]])
            except BlockingIOError:         # another process has read it
                continue
            except OSError as error:
                raise CkptError(f'cannot read the stream: {error.strerror}', errno=error.errno,
                                hint='give a pipe, a socket or a file that is open for reading') from error
            self.at += done
            return self._buffer[:done]

    def chunks(self, length: int) -> Iterator[memoryview]:
        """Yield the next `length` bytes."""
        while length:
            chunk = self.some(min(length, CHUNK))
            if not chunk:
                raise _damaged(f'it ends at byte {self.at}')
            length -= len(chunk)
            yield chunk

    def exactly(self, length: int) -> bytes:
        return b''.join(bytes(chunk) for chunk in self.chunks(length))

    def padding(self, length: int) -> None:
        """Read the padding of a block after so many bytes."""
        if any(self.exactly(-length % BLOCK)):
            raise _damaged(f'no padding before byte {self.at}')


class _Archive:
    """The members of the archive, one after the other."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._directory: str | None = None      # the directory of the first member, '' if it has none

    def manifest(self) -> Manifest:
        """Read the first file, which must be the manifest."""
        name, size = self._next() or ('', 0)
        if name != NAME:
            raise _damaged(f'it begins with {name!r}, not with {NAME}')
        if not 0 <= size <= MAX_MANIFEST:
            raise _damaged(f'a {NAME} of {size} bytes')
        try:
            manifest = decode_manifest(self._stream.exactly(size))
        except ImageDamaged as error:
            # the default hint is to verify the image, but it is not in the spool
            if error.hint == ImageDamaged.default_hint:
                error.hint = _HINT
            raise
        self._stream.padding(size)
        return manifest

    def receive(self, directory: Path, manifest: Manifest, watcher: Watcher, keep_free: int) -> None:
        """Write every part into a file of its own, and read the end of the stream."""
        missing, done = dict(manifest.parts), 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            watcher.progress(done, manifest.size)

        while (member := self._next()) is not None:
            name, size = member
            part = missing.pop(name, None)
            if part is None:
                raise _damaged(f'{name!r} is {"there twice" if name in manifest.parts else "no part of it"}')
            if size != part.size:
                raise _damaged(f'{name} has {size} bytes, not {part.size}')
            self._write(directory / name, size, on_bytes, keep_free)
        if missing:
            raise _damaged(f'{", ".join(sorted(missing)[:5])} missing')
        self._end()

    def _write(self, path: Path, size: int, on_bytes: Callable[[int], None], keep_free: int) -> None:
        with spooling(path):
            fd = create(path)
        try:
            for chunk in self._stream.chunks(size):
                if keep_free:
                    require_room(path, len(chunk), keep_free, at=fd)
                with spooling(path):
                    write_all(fd, chunk)
                on_bytes(len(chunk))
        finally:
            with spooling(path):
                os.close(fd)        # a network file system reports a full disk only here
        self._stream.padding(size)

    def _next(self) -> tuple[str, int] | None:
        """Return name in its directory and size of the next file; None at the end mark."""
        block = self._stream.exactly(BLOCK)
        if not any(block):
            return None
        info = _parse_header(block)
        if info.type == tarfile.XHDTYPE:
            size = self._pax(info.size)
            info = _parse_header(self._stream.exactly(BLOCK))
            info.size = info.size if size is None else size
        if info.type == tarfile.DIRTYPE and self._directory is None and is_image_id(info.name) and not info.size:
            self._directory = info.name
            return self._next()
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise _damaged(f'{info.name[:256]!r} is not a regular file')
        return self._strip(info.name), info.size

    def _pax(self, size: int) -> int | None:
        """Return the size of the next member if the pax header has it."""
        if not 0 <= size <= MAX_PAX:
            raise _damaged(f'a pax header of {size} bytes')
        records = parse_pax(self._stream.exactly(size))
        self._stream.padding(size)
        for key in records.keys() - _IGNORED - {'size'}:
            raise _damaged(f'a pax record {key[:64]!r}')
        text = records.get('size')
        if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise _damaged(f'a size of {text[:64]!r}')
        return None if text is None else int(text)

    def _strip(self, path: str) -> str:
        """Remove the one directory that contains all members from a name."""
        directory, slash, name = path.rpartition('/')
        if self._directory is None and (is_image_id(directory) or not slash):
            self._directory = directory
        if directory != self._directory or bool(slash) != bool(directory):
            raise _damaged(f'a member {path[:256]!r}')
        return name

    def _end(self) -> None:
        """Read the second block of the end mark, then zeros to the end-of-file."""
        at = self._stream.at
        if any(self._stream.exactly(BLOCK)):
            raise _damaged(f'half an end mark at byte {at}')
        while chunk := self._stream.some(CHUNK):
            if any(chunk) or self._stream.at - at > MAX_PADDING:
                raise _damaged(f'more follows its end at byte {at}')


def _parse_header(block: bytes) -> tarfile.TarInfo:
    """Parse a header of ustar or GNU tar with a correct checksum."""
    if block[257:262] != b'ustar':
        raise _damaged('a block that is not a tar header')
    try:
        info = tarfile.TarInfo.frombuf(block, 'utf-8', 'surrogateescape')
    except tarfile.HeaderError as error:
        raise _damaged(f'a tar header with {error}') from error
    return info


def parse_pax(data: bytes) -> dict[str, str]:
    r"""Parse the records of a pax header: '%d %s=%s\\n', beginning with the length of the whole record.
    ImageDamaged."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        head, space, _ = data[at:at + 6].partition(b' ')
        length = int(head) if space and head.isdigit() else 0
        key, equals, value = data[at + len(head) + 1:at + length].partition(b'=')
        if not equals or not value.endswith(b'\n') or at + length > len(data):
            raise _damaged('an invalid pax header')
        name = key.decode('utf-8', 'surrogateescape')
        if name in records:
            raise _damaged(f'two pax records {name[:64]!r}')
        records[name] = value[:-1].decode('utf-8', 'surrogateescape')
        at += length
    return records


def incoming(spool: Path, image: str, size: int, keep_free: int = 0, *, keep_id: bool = True,
             make: Callable[[Path, str], Place]) -> Place:
    """Make the directory in which an image of `size` bytes is received. SpoolFailed, also if there is no room.

    keep_id: keep the id if it is free. Otherwise it is always changed, so that the sender does not learn whether such
    an image exists. make: Incoming, or a subclass.
    """
    require_room(spool, size, keep_free)
    image = image if keep_id else other_image_id(image)
    for _ in range(_TRIES):
        try:
            found = make(spool, image)
        except SpoolFailed as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            # checked only now: an id can be published only by the owner of its directory
            if not os.path.lexists(spool / image):
                return found
            found.abort()
        image = other_image_id(image)
    raise spool_failed(spool / image, OSError(errno.EEXIST, os.strerror(errno.EEXIST)))


def destination_in(spool: Path, keep_free: int = 0, *, keep_id: bool = True) -> Callable[[Manifest], Destination]:
    """Return a destination for `read_archive`: a directory in the spool itself."""
    return lambda manifest: incoming(spool, manifest.image, manifest.size, keep_free, keep_id=keep_id, make=Incoming)


def _verify(directory: Path, manifest: Manifest, watcher: Watcher) -> None:
    """Verify the image while another thread brings it to the disk. ImageDamaged, SpoolFailed."""
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        watcher.progress(min(done, manifest.size), manifest.size)

    files = DirectoryFiles(directory, own=True)
    with ThreadPoolExecutor(1, 'fsync') as pool:
        try:
            synced = [pool.submit(_sync, directory / name) for name in manifest.parts]
            with _bounded_memory():
                damages = verify(files, on_bytes)
            if damages:
                more = f' (and {len(damages) - 1} more)' if len(damages) > 1 else ''
                raise _damaged(f'{damages[0]}{more}')
            for future in synced:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            files.close()


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Limit the memory of the body: its MemoryError becomes LimitsExceeded, before the machine is out of memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # RLIM_INFINITY is -1: no limit is above it
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if soft < 0 else min(MEMORY, soft), hard))
    try:
        yield
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))      # undoing the rest needs some memory
        raise LimitsExceeded(f'verifying the records takes more than {MEMORY >> 20} MiB of memory') from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _sync(path: Path) -> None:
    with spooling(path):
        # A writeback error that no process has seen is also reported to a process that opens the file later: Linux
        # b4678df184b3 "errseq: Always report a writeback error once" (v4.17)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
