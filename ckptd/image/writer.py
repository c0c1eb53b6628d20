# SPDX-License-Identifier: LGPL-2.1-or-later
"""Incoming, ImageWriter: one image on its way into the spool. It is published as a whole or never visible.

    SPOOL/
        20240131_235959_sleep_3fa9/         a published image; its name never names anything incomplete
            tree.img tasks.img files.img memory.img data-0.img ... manifest.json
        .incoming-20240131_235959_.../      0700, being written: its writer holds a flock(2) on the directory

A writer that dies leaves a directory whose lock is free, and `remove_stale` removes it. Order of publishing: parts and
their digests, manifest, each with fsync; the directory; rename; the spool.
"""

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import msgspec

from ckptd import flock
from ckptd.errors import SpoolFailed
from ckptd.fileio import write_all
from ckptd.image.files import create, digest_file, require_room, spool_failed, spooling, sync_directory
from ckptd.image.grammar import Record, encode_end, encode_header, encode_record
from ckptd.image.ids import is_image_id
from ckptd.image.manifest import NAME, Manifest, Part, encode_manifest
from ckptd.image.pages import DataWriter
from ckptd.image.records import PARTS

INCOMING = '.incoming-'
FLUSH = 1 << 20


class PartWriter:
    """The writer of one record file, such as tree.img. keep_free: as in DataWriter."""

    def __init__(self, directory: Path, code: str, keep_free: int = 0) -> None:
        self.path, self._keep_free = directory / PARTS[code], keep_free
        self.records = 0
        self._buffer = bytearray(encode_header(code.encode()))
        with spooling(self.path):
            self._fd = create(self.path)

    def fileno(self) -> int:
        return self._fd

    def write(self, record: Record) -> None:
        """Append a record. SpoolFailed."""
        self._buffer += encode_record(record)
        self.records += 1
        if len(self._buffer) >= FLUSH:
            self._flush()

    def finish(self) -> None:
        """Write the end record. SpoolFailed."""
        self._buffer += encode_end(self.records)
        self._flush()

    def _flush(self) -> None:
        if self._keep_free:
            require_room(self.path, len(self._buffer), self._keep_free, at=self._fd)
        with spooling(self.path):
            write_all(self._fd, self._buffer)
        self._buffer.clear()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with spooling(self.path):
                os.close(fd)


class Incoming:
    """Owner of SPOOL/.incoming-IMAGE, which becomes SPOOL/IMAGE. Leaving the `with` before that removes it.

        with Incoming(spool, image) as incoming:
            ...                                 # parts in incoming.path, each with fsync
            incoming.write_manifest(manifest)
            incoming.show()
    """

    def __init__(self, spool: Path, image: str) -> None:
        if not is_image_id(image):
            raise ValueError(f'{image!r} is not an image id')
        self.spool, self.image = spool, image
        self.path = spool / f'{INCOMING}{image}'
        self._lock = _make_locked(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.abort()

    def write_manifest(self, manifest: Manifest) -> None:
        """Write manifest.json and bring it to the disk. SpoolFailed."""
        write_manifest(self.path, manifest)

    def show(self) -> None:
        """Make the image visible under its id. SpoolFailed."""
        final = self.spool / self.image
        with spooling(final):
            sync_directory(self.path)
            if final.exists():      # rename(2) would replace an empty directory
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self.path.rename(final)
        self._unlock()
        try:
            with spooling(self.spool):
                sync_directory(self.spool)
        except SpoolFailed:
            shutil.rmtree(final, ignore_errors=True)    # an image that may not be on the disk is not published
            raise

    def abort(self) -> None:
        """Remove an unpublished image. After `show` do nothing. This never fails: `remove_stale` comes later."""
        if self._lock < 0:
            return
        # the spool may have another path by now, or none, so the directory is found by its fd
        here = Path(os.readlink(f'/proc/self/fd/{self._lock}'))  # noqa: PTH115
        shutil.rmtree(here if _is_at(self._lock, here) else self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            flock.close(self._lock)
            self._lock = -1


class Destination(Protocol):
    """A directory that an image is written to, such as Incoming."""
    path: Path
    image: str

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None: ...
    def write_manifest(self, manifest: Manifest) -> None: ...
    def show(self) -> None: ...
    def abort(self) -> None: ...


class ImageWriter:
    """An image that is written record by record. keep_free: as in DataWriter.

        with ImageWriter(Incoming(spool, image)) as writer:
            writer.part('TREE').write(record)
            writer.data.add(chunks)
            writer.seal()                       # after the tree was released: reads everything again for the digests
            writer.publish(manifest)
    """

    def __init__(self, destination: Destination, keep_free: int = 0) -> None:
        self._destination = destination
        self.path, self.image, self._keep_free = destination.path, destination.image, keep_free
        self._parts: dict[str, PartWriter] = {}
        self._data: list[DataWriter] = []
        self._sealed: dict[str, Part] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.abort()

    def part(self, code: str) -> PartWriter:
        """Return the writer of 'TREE', 'TASK', 'FILE' or 'MEM '. The file is made at the first call. SpoolFailed."""
        if code not in self._parts:
            self._parts[code] = PartWriter(self.path, code, self._keep_free)
        return self._parts[code]

    @property
    def data(self) -> DataWriter:
        """The writer of data-0.img."""
        return self._data[0] if self._data else self.new_data()

    def new_data(self) -> DataWriter:
        """Make a further data-N.img, for a process or thread that writes on its own. SpoolFailed."""
        self._data.append(DataWriter(self.path, len(self._data), self._keep_free))
        return self._data[-1]

    @property
    def size(self) -> int:
        """Bytes of page data and other bulk so far: nearly all of an image."""
        return sum(data.size for data in self._data)

    def seal(self, on_bytes: Callable[[int], None] | None = None) -> dict[str, Part]:
        """Complete all parts, bring them to the disk, return their sizes and digests. SpoolFailed.

        on_bytes(n) is called after every n bytes that were hashed. An error that it raises ends the work.
        """
        if self._sealed is None:
            for code in PARTS:      # a part without records is written, too, since missing files are damage
                self.part(code)
            writers: list[PartWriter | DataWriter] = [self.data, *self._data[1:], *self._parts.values()]
            for writer in writers:
                writer.finish()
            # the disk and sha256 work at the same time; neither needs the interpreter's lock
            with ThreadPoolExecutor(1, 'fsync') as pool:
                synced = [pool.submit(_sync, writer) for writer in writers]
                sealed = {writer.path.name: _digest(writer, on_bytes) for writer in writers}
                for future in synced:
                    future.result()
            for writer in writers:
                writer.close()
            self._sealed = sealed
        return self._sealed

    def publish(self, manifest: Manifest) -> Manifest:
        """Make the image visible. Return the manifest with its parts filled in. SpoolFailed."""
        manifest = msgspec.structs.replace(manifest, image=self._destination.image, parts=self.seal())
        self._destination.write_manifest(manifest)
        self._destination.show()
        return manifest

    def abort(self) -> None:
        writers: list[PartWriter | DataWriter] = [*self._parts.values(), *self._data]
        for writer in writers:
            with suppress(SpoolFailed):
                writer.close()
        self._destination.abort()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json of an image and bring it to the disk. SpoolFailed."""
    path = directory / NAME
    with spooling(path):
        fd = create(path)
        try:
            write_all(fd, encode_manifest(manifest))
            os.fsync(fd)
        finally:
            os.close(fd)


def _make_locked(path: Path) -> int:
    """Make a directory and return the fd that holds its lock. SpoolFailed."""
    while True:
        with spooling(path):
            path.mkdir(mode=0o700)
        try:
            fd = _open_directory(path)
        except FileNotFoundError:
            continue            # `remove_stale` removed it before it was locked
        except OSError as error:
            raise spool_failed(path, error) from error
        flock.lock(fd)
        if _is_at(fd, path):
            return fd
        flock.close(fd)


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _sync(writer: PartWriter | DataWriter) -> None:
    with spooling(writer.path):
        os.fsync(writer.fileno())


def _digest(writer: PartWriter | DataWriter, on_bytes: Callable[[int], None] | None) -> Part:
    with spooling(writer.path):
        size, digest = digest_file(writer.fileno(), on_bytes)
    return Part(size=size, sha256=digest)


def remove_stale(spool: Path) -> list[str]:
    """Remove the directories of dead writers. Return the ids of the unfinished images. SpoolFailed."""
    with spooling(spool):
        entries = sorted(path for path in spool.iterdir() if path.name.startswith(INCOMING))
    removed = []
    for path in entries:
        # another process that removes it at the same time continues where this one stops
        with spooling(path), suppress(FileNotFoundError):
            if _remove_unlocked(path):
                removed.append(path.name.removeprefix(INCOMING))
    return removed


def _remove_unlocked(path: Path) -> bool:
    try:
        fd = _open_directory(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        flock.lock(fd, wait=False)
        # It may have been published between listing and locking. If it is still here, its lock has no other owner.
        if not _is_at(fd, path):
            return False
        shutil.rmtree(path)
        return True
    except BlockingIOError:
        return False
    finally:
        flock.close(fd)
