# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of an image, read-only: a directory, or fds that another process has opened.

A worker of an ordinary user cannot enter the spool. It gets the files of one image as fds.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from ckptd.errors import ImageDamaged
from ckptd.image.files import open_regular


class ImageFiles(Protocol):
    """The files of an image. Their maker owns them until `close`."""

    def names(self) -> list[str]:
        """Return every name in the image, whatever it is."""
        ...

    def open(self, name: str) -> int:
        """Open a regular file. Read it by offset only, because others may share its position. ImageDamaged."""
        ...

    def close(self) -> None: ...


class DirectoryFiles:
    """An image by its directory. ImageDamaged if it cannot be opened. own: the path is ckptd's own and may be a link in
    /proc to an open directory."""

    def __init__(self, directory: Path, *, own: bool = False) -> None:
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if own else os.O_NOFOLLOW))
        except OSError as error:
            raise ImageDamaged(f'{directory} cannot be opened: {error.strerror}', resource=str(directory)) from error

    def names(self) -> list[str]:
        with os.scandir(self._fd) as entries:
            return [entry.name for entry in entries]

    def open(self, name: str) -> int:
        return open_regular(self._fd, name)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class GivenFiles:
    """An image by the open fds of its files, which this object owns."""

    def __init__(self, fds: Mapping[str, int]) -> None:
        self._fds = dict(fds)

    def names(self) -> list[str]:
        return list(self._fds)

    def open(self, name: str) -> int:
        if name not in self._fds:
            raise ImageDamaged(f'{name} is missing', resource=name)
        return os.dup(self._fds[name])

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


class _AtOffset(io.RawIOBase):
    """A file that is read from its beginning by pread(2), so that other readers of the description do not interfere."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd, self._at = fd, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        done = os.preadv(self._fd, [memoryview(cast(bytearray, buffer))], self._at)
        self._at += done
        return done

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()


def open_part(files: ImageFiles, name: str) -> io.BufferedReader:
    """Open a part for reading from its beginning. ImageDamaged."""
    return io.BufferedReader(_AtOffset(files.open(name)), 1 << 16)


@contextmanager
def files_of(image: Path | ImageFiles) -> Iterator[ImageFiles]:
    """Provide the files of an image for a block. Those of a directory are closed at its end; given ones stay open."""
    if not isinstance(image, Path):
        yield image
        return
    files = DirectoryFiles(image)
    try:
        yield files
    finally:
        files.close()
