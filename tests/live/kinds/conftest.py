# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files of a forked child, and an image that keeps its bulk bytes in memory."""

from collections.abc import Callable, Iterable, Iterator

import pytest

from ckptd.image.records import Extent
from ckptd.kinds.base import OpenFile, read_open_file
from ckptd.kinds.content import Segment
from tests.lib.brood import Brood


class Bulk:
    """A Content whose extents are read back with `read`."""

    def __init__(self) -> None:
        self.stretches: list[bytes] = []

    def add(self, chunks: Iterable[bytes]) -> Extent:
        data = b''.join(chunks)
        self.stretches.append(data)
        return Extent(0, len(self.stretches) - 1, len(data))

    def read(self, extent: Extent) -> bytes:
        assert len(self.stretches[extent.offset]) == extent.length
        return self.stretches[extent.offset]

    def file(self, size: int, segments: Iterable[Segment]) -> bytes:
        """The whole content of a file that was dumped in segments."""
        data = bytearray(size)
        for segment in segments:
            data[segment.start:segment.start + segment.extent.length] = self.read(segment.extent)
        assert len(data) == size
        return bytes(data)


@pytest.fixture
def bulk() -> Bulk:
    return Bulk()


@pytest.fixture
def brood() -> Iterator[Brood]:
    with Brood() as running:
        yield running


@pytest.fixture
def opened(brood: Brood) -> Callable[[Callable[[], int]], OpenFile]:
    """opened(work): work() runs in a child and returns an fd; the file that it is, as ckptd sees it."""
    def run(work: Callable[[], int]) -> OpenFile:
        return read_open_file(*brood.ask(work))
    return run
