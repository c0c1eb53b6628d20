# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of a kind of memory mapping.

A kind is one class in one file of this package, found by registry.py. No other module names it. The hooks in life
order, none of which affects the task:

    matches(mapping)        is this mapping of my kind? At most one kind says yes
    finding(tid, mapping)   the reason why it cannot be dumped, or what will be lost
    object_of(view)         the file or shared object behind it, which is noted once in the tree
    offset_of(mapping)      its place in that object
    copy(copier, links)     content of these objects that nothing else keeps
    records()               their records

and for a restart:

    lacks(context)              reasons why this machine cannot map it again
    restart_findings(context)   reasons why the objects behind such mappings cannot be had again; changes nothing
    needs(reader, lookup)       space that is needed to make these objects again
    open(vma, means)            opens the object, before the task exists that inherits it
    map(vma, ...)               calls of the task that map it at its old address
    patch(vma, space)           writes what the task itself cannot, when everything is mapped
    seal(means)                 state of objects that would prevent mapping them
    finish(means)               state of objects that is set when nothing else can fail

A kind of region is state of ranges of an address space that no mapping shows. Its hooks:

    scan(pagemap, spans)        the ranges in the private mappings of an address space
    record(mm_id, found)        their record
    lacks(context)              as above
    restore(memory, script)     calls of the task that make them again, when all tasks exist
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from mmap import MAP_PRIVATE
from typing import TYPE_CHECKING, Any, ClassVar

from ckptd.errors import Finding
from ckptd.image.grammar import Record
from ckptd.image.reader import ImageReader, Memory
from ckptd.image.records import Vma
from ckptd.kernel.maps import Mapping, map_file
from ckptd.kernel.memory import PageMap, Range
from ckptd.kernel.mman import MAP_FIXED_NOREPLACE, MAP_LOCKED
from ckptd.objects.attributes.base import about
from ckptd.objects.files.base import FileLookup, Needs
from ckptd.objects.mappings.means import (
    Links,
    MappedSpace,
    MappingCheck,
    MappingContext,
    MappingLookup,
    MappingMeans,
    PageCopier,
)
from ckptd.remote.script import Script

# re-exported, so that kinds import all common names from here
__all__ = ['Links', 'MappedSpace', 'MappingCheck', 'MappingContext', 'MappingLookup', 'MappingMeans', 'PageCopier']

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
    """A shared object and the mappings through which it can be read.

    fd: of the object, -1 if it is not open. huge: size of its huge pages in bytes, 0 if it has none.
    """
    shm_id: int
    kind: 'SharedMemoryKind'
    path: str
    inode: int
    views: list[View] = field(default_factory=list)
    fd: int = -1
    huge: int = 0

    @property
    def extent(self) -> int:
        """Bytes of the object that mappings cover, from its start."""
        return max((view.mapping.offset + view.mapping.size for view in self.views), default=0)


class MappingTables:
    """The shared objects of one look at a tree, by major and minor number of the device, and inode."""

    def __init__(self) -> None:
        self.shared: dict[tuple[int, int, int], SharedObject] = {}


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
    is_special: ClassVar[bool] = False          # the kernel uses it, and this kind can make it again (special.py)
    is_placed: ClassVar[bool] = False           # the kernel chooses where it is mapped (restore/placing.py)
    is_anonymous: ClassVar[bool] = False        # a task can make it writable, whatever its protection will be
    takes_name: ClassVar[bool] = False          # PR_SET_VMA_ANON_NAME can name it
    ignores_protection: ClassVar[bool] = False  # `map` leaves its protection to mprotect(2)

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

    def offset_of(self, mapping: Mapping) -> int:
        """Return Vma.offset."""
        return mapping.offset

    def copy(self, copier: PageCopier, links: Links) -> None:
        return

    def records(self) -> Iterable[Record]:
        return ()

    # ------------------------------------------------------------ restart

    def lacks(self, context: MappingCheck) -> Iterable[Finding]:
        return ()

    def restart_findings(self, context: MappingCheck) -> Iterable[Finding]:
        return ()

    def needs(self, reader: ImageReader, lookup: FileLookup) -> Iterable[Needs]:
        return ()

    def fd(self, number: int, means: MappingMeans, *, writable: bool) -> int:
        """Return the service fd of a file or shared object by its id; -1 for a kind that has none."""
        return -1

    def open(self, vma: Vma, means: MappingMeans) -> int:
        """Return the service fd that is mapped. The first call opens it."""
        return self.fd(vma.object, means, writable=not vma.flags & MAP_PRIVATE and may_write(vma))

    def map(self, vma: Vma, protection: int, script: Script, space: MappedSpace) -> None:
        flags = vma.flags & ~MAP_LOCKED | MAP_FIXED_NOREPLACE
        script.call('mmap', vma.start, vma.end - vma.start, protection, flags, self.open(vma, space.means), vma.offset,
                    about=label(vma), expect=vma.start)

    def patch(self, vma: Vma, space: MappedSpace) -> None:
        return

    def seal(self, means: MappingMeans) -> None:
        return

    def finish(self, means: MappingMeans) -> None:
        return


class PrivateMemoryKind(MappingKind):
    """A kind of memory without a file or shared object behind it."""

    def object_of(self, view: View) -> tuple[int, int]:
        [number] = self.numbers
        return number, 0


class RegionKind(ABC):
    """One kind of region."""

    @abstractmethod
    def scan(self, pagemap: PageMap, spans: Sequence[Range]) -> list[Range]: ...

    @abstractmethod
    def record(self, mm_id: int, found: Sequence[Range]) -> Record: ...

    def lacks(self, context: MappingCheck) -> Iterable[Finding]:
        return ()

    @abstractmethod
    def restore(self, memory: Memory, script: Script) -> None: ...


def may_write(vma: Vma) -> bool:
    """Whether a shared mapping was made from a file that is open for writing."""
    return 'mw' in vma.vm_flags.split()


def label(vma: Vma) -> str:
    """Return the addresses and the name of a mapping, for errors."""
    return f'{vma.start:x}-{vma.end:x} {vma.name}'.rstrip()


def lacking(vpid: int, what: str, since: str) -> Finding:
    """Make a finding about a feature of the kernel."""
    return about(vpid, 'kernel', 'ENOSYS', f'uses {what}, which this kernel lacks',
                 f'boot a kernel {since} or newer')
