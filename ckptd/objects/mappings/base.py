# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of a kind of memory mapping.

A kind is one class in one file of this package, found by registry.py. No other module names it. The hooks in life
order, none of which affects the task:

    matches(mapping)        is this mapping of my kind? At most one kind says yes
    finding(tid, mapping)   the reason why it cannot be dumped, or what will be lost
    object_of(view)         the file or shared object behind it, which is noted once in the tree
    copy(copier, links)     content of these objects that nothing else keeps
    records()               their records
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from mmap import MAP_PRIVATE
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ckptd.errors import Finding
from ckptd.image.grammar import Record
from ckptd.image.records import Extent, PageRun
from ckptd.kernel.maps import Mapping, map_file
from ckptd.kernel.memory import Mem, Range
from ckptd.objects.files.linked import DeletedFile

if TYPE_CHECKING:
    from ckptd.objects.mappings.shared_memory import SharedMemoryKind

RELEASE = 'let the program release it before the checkpoint'     # a hint


# ---------------------------------------------------------------- dump

@dataclass(frozen=True, slots=True)
class View:
    """A mapping of a file or a shared object by process `tid`."""
    tid: int
    mapping: Mapping

    @property
    def magic_link(self) -> str:
        """Link to the mapped file, deleted or not; for a View without addresses, to the task's program."""
        return map_file(self.tid, self.mapping) if self.mapping.size else f'/proc/{self.tid}/exe'


@dataclass(slots=True)
class SharedObject:
    """A shared object and the mappings through which it can be read. fd: of the object, -1 if it is not open."""
    shm_id: int
    kind: 'SharedMemoryKind'
    path: str
    inode: int
    views: list[View] = field(default_factory=list)
    fd: int = -1

    @property
    def extent(self) -> int:
        """Bytes of the object that mappings cover, from its start."""
        return max((view.mapping.offset + view.mapping.size for view in self.views), default=0)


class MappingTables:
    """The shared objects of one look at a tree, by major and minor number of the device, and inode."""

    def __init__(self) -> None:
        self.shared: dict[tuple[int, int, int], SharedObject] = {}


class PageCopier(Protocol):
    """A copier of pages into the image."""

    def copy_memory(self, mem: Mem, ranges: Sequence[Range], *, base: int = 0) -> list[PageRun]:
        """Copy page-aligned ranges of a process. The start of a run is the address minus `base`."""
        ...

    def copy_file(self, fd: int, size: int) -> list[PageRun]:
        """Copy the data of a file without its holes. The start of a run is a byte offset."""
        ...

    def copy_whole(self, fd: int, size: int) -> Extent:
        """Copy a file as one extent."""
        ...


class Links(Protocol):
    """The new names of deleted files, see objects/files/linked.py."""

    def link(self, file: DeletedFile, fd: int) -> str:
        """Give a file that is open as `fd` a new name and return its path. CkptError."""
        ...


# ---------------------------------------------------------------- kinds

class MappingKind(ABC):
    """One kind of mapping: `class AnonymousMapping(MappingKind, numbers=[ANON])`.

    The class is the rule, an instance is the state of one job. numbers: Vma.kind in images. names: as /proc/PID/maps
    shows them; a mapping of such a name is of this kind, and `matches` is not asked.
    """
    numbers: ClassVar[Collection[int]] = ()
    names: ClassVar[Collection[str]] = ()
    map_type: ClassVar[int] = MAP_PRIVATE       # MAP_* of a mapping that is not shared
    is_kernels: ClassVar[bool] = False          # the kernel makes it in every process (arch/x86/entry/vdso)
    keeps_all_pages: ClassVar[bool] = False     # the image has all pages of it, written or not

    def __init_subclass__(cls, *, numbers: Collection[int] = (), names: Collection[str] = (), **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.numbers, cls.names = numbers or cls.numbers, names

    def __init__(self, tables: MappingTables) -> None:
        self._tables = tables

    def matches(self, mapping: Mapping) -> bool:
        return False

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        return None

    @abstractmethod
    def object_of(self, view: View) -> tuple[int, int]:
        """Return Vma.kind and Vma.object."""

    def copy(self, copier: PageCopier, links: Links) -> None:
        return

    def records(self) -> Iterable[Record]:
        return ()


class PrivateMemoryKind(MappingKind):
    """A kind of memory without a file or shared object behind it."""

    def object_of(self, view: View) -> tuple[int, int]:
        [number] = self.numbers
        return number, 0
