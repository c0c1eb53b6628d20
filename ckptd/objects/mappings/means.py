# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interfaces for kinds of mappings: a copier of pages for a dump, a look at this machine before a restart, and
means to map during it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckptd.errors import Finding
from ckptd.image.reader import ImageReader, ImageTask, Memory
from ckptd.image.records import Extent, PageRun
from ckptd.journal.steps import MakeSegment
from ckptd.kernel.memory import Mem, Range
from ckptd.kernel.shm import ShmidDs
from ckptd.objects.files.base import FileLookup, FileMaking
from ckptd.objects.files.linked import DeletedFile
from ckptd.remote.stub import Stub

# ---------------------------------------------------------------- dump


class PageCopier(Protocol):
    """A copier of pages into the image."""

    def copy_memory(self, mem: Mem, ranges: Sequence[Range], *, base: int = 0) -> list[PageRun]:
        """Copy page-aligned ranges of a process. The start of a run is the address minus `base`."""
        ...

    def copy_file(self, fd: int, size: int, ranges: Iterable[Range] | None = None) -> list[PageRun]:
        """Copy the data of a file without its holes, or only these ranges of whole pages. The start of a run is a byte
        offset."""
        ...

    def copy_whole(self, fd: int, size: int) -> Extent:
        """Copy a file as one extent."""
        ...


class Links(Protocol):
    """The new names of deleted files, see objects/files/linked.py."""

    def link(self, file: DeletedFile, fd: int) -> str:
        """Give a file that is open as `fd` a new name and return its path. CkptError."""
        ...


# ---------------------------------------------------------------- restart

class SegmentRights(Protocol):
    """The rights that decide about a System V segment that still exists."""

    def may_take(self, found: ShmidDs) -> bool:
        """Whether its content may be replaced by that of the image."""
        ...

    def owns(self, found: ShmidDs) -> bool:
        """Whether its owner and mode may be set again."""
        ...


class MappingLookup(FileLookup, SegmentRights, Protocol):
    """Access to this machine before a restart begins."""


class MappingContext(FileMaking, SegmentRights, Protocol):
    """Means for files and segments during a restart."""


class MappingCheck(Protocol):
    """The input of the checks of a restart."""

    @property
    def reader(self) -> ImageReader: ...
    @property
    def lookup(self) -> MappingLookup: ...

    @property
    def mm_users(self) -> Mapping[int, int]:
        """Vpid of the first living task of each address space, by mm_id."""

    @property
    def alive(self) -> Sequence[ImageTask]:
        """All living tasks."""

    def out_of_reach(self, vpid: int, resource: str, path: str) -> Finding | None:
        """Return a finding if the user's rights cannot open a path, whatever is there."""

    def by_whom(self, row: Finding) -> Finding:
        """Complete the hint of a finding about a file, where the rights of another user than the caller count."""


@dataclass(frozen=True, slots=True)
class MappingMeans:
    """The means of a restart for mappings. note: writes down a step for an object that would outlive a failure."""
    reader: ImageReader
    files: MappingContext
    note: Callable[[MakeSegment], None]


@dataclass(frozen=True, slots=True)
class MappedSpace:
    """An address space that one of its own tasks makes."""
    memory: Memory
    stub: Stub
    means: MappingMeans
