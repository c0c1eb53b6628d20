# SPDX-License-Identifier: LGPL-2.1-or-later
"""All kinds: every subclass of MappingKind or RegionKind in a module of this package. A new kind is a new file, and
nothing else changes."""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.grammar import Record
from ckptd.image.reader import ImageReader
from ckptd.image.records import FILE_PRIVATE, SHARED_MEMORY, Mm, PageRun, SharedMemory, Vma
from ckptd.kernel.maps import Mapping
from ckptd.objects import mappings
from ckptd.objects.attributes.base import about
from ckptd.objects.files.base import FileLookup, Needs
from ckptd.objects.mappings import seals
from ckptd.objects.mappings.base import (
    Links,
    MappingCheck,
    MappingKind,
    MappingMeans,
    MappingTables,
    PageCopier,
    RegionKind,
    View,
)
from ckptd.objects.mappings.shared_memory import SharedMemoryKind
from ckptd.objects.mappings.special import special_memory
from ckptd.objects.modules import modules_of
from ckptd.remote.script import Script

K = TypeVar('K')


def _kinds_of(cls: type[K]) -> Iterator[type[K]]:
    """Yield the classes below a class that have none below them; the others are what several kinds have in common."""
    for one in cls.__subclasses__():
        if not one.__subclasses__():
            yield one
        yield from _kinds_of(one)


def _discover(cls: type[K]) -> tuple[type[K], ...]:
    modules_of(mappings)
    return tuple(sorted(_kinds_of(cls), key=lambda one: one.__name__))


_KINDS = _discover(MappingKind)  # type: ignore[type-abstract]
REGIONS = tuple(cls() for cls in _discover(RegionKind))  # type: ignore[type-abstract]
# Vma.kind
KERNELS_OWN = frozenset(number for kind in _KINDS if kind.is_kernels for number in kind.numbers)
KEPT_WHOLE = frozenset(number for kind in _KINDS if kind.keeps_all_pages for number in kind.numbers)
PLACED = frozenset(number for kind in _KINDS if kind.is_placed for number in kind.numbers)
ANONYMOUS = frozenset(number for kind in _KINDS if kind.is_anonymous for number in kind.numbers)


class MappingKinds:
    """The kinds of one job."""

    def __init__(self) -> None:
        self._tables = MappingTables()
        self.all = [cls(self._tables) for cls in _KINDS]
        self._by_name = {name: kind for kind in self.all for name in kind.names}
        self._by_record = {(number, kind.object_kind if isinstance(kind, SharedMemoryKind) else 0): kind
                           for kind in self.all for number in kind.numbers}
        self._matching = [kind for kind in self.all if type(kind).matches is not MappingKind.matches]

    def of(self, mapping: Mapping) -> MappingKind:
        """Return the kind of a mapping."""
        if found := self._by_name.get(mapping.path):
            return found
        for kind in self._matching:
            if kind.matches(mapping):
                return kind
        raise AssertionError(f'a mapping is of no kind: {mapping}')

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        """Return the reason why a mapping of task `tid` cannot be dumped, or what will be lost."""
        kind = self.of(mapping)
        # vvar has the flags of device memory
        if kind.is_kernels:
            return None
        return (None if kind.is_special else special_memory(mapping)) or kind.finding(tid, mapping)

    def of_record(self, number: int, object_kind: int = 0) -> MappingKind:
        """Return the kind for Vma.kind and, for a shared object, SharedMemory.kind. ImageDamaged."""
        kind = self._by_record.get((number, object_kind))
        if kind is None:
            what = f'shared object of kind {object_kind}' if number == SHARED_MEMORY else f'mapping of kind {number}'
            raise ImageDamaged(f'memory.img: a {what}, which is unknown',
                               resource='memory.img', hint='use the ckptd that wrote the image, or a newer one')
        return kind

    # ------------------------------------------------------------ objects behind mappings, each once

    def executable(self, tid: int) -> int:
        """Return the backing id of /proc/TID/exe. The link opens the file itself, so a deleted one is found, too."""
        exe = f'/proc/{tid}/exe'
        path, at = os.readlink(exe), os.stat(exe)  # noqa: PTH115, PTH116
        mapping = Mapping(0, 0, True, False, True, False, 0, os.major(at.st_dev), os.minor(at.st_dev), at.st_ino, path)
        _, backing_id = self.of_record(FILE_PRIVATE).object_of(View(tid, mapping))
        return backing_id

    def share_file(self, at: os.stat_result, path: str, open_path: str) -> int:
        """Return the shm_id of the object behind an open file, mapped or not."""
        [kind] = [one for one in self.all if isinstance(one, SharedMemoryKind) and path.startswith(one.prefixes)]
        return kind.share_file(at, path, open_path)

    @property
    def shared_extent(self) -> int:
        """Bytes of shared objects that mappings cover."""
        return sum(shared.extent for shared in self._tables.shared.values())

    def copy_shared(self, copier: PageCopier) -> Iterator[tuple[SharedMemory, list[PageRun]]]:
        """Copy the content of shared objects. Yield their records and page runs."""
        for shared in self._tables.shared.values():
            yield shared.kind.copy_object(shared, copier)

    def copy_files(self, copier: PageCopier, links: Links) -> None:
        """Copy mapped files that nothing else keeps."""
        for kind in self.all:
            kind.copy(copier, links)

    def records(self) -> Iterator[Record]:
        """Yield the records of mapped files."""
        for kind in self.all:
            yield from kind.records()

    def close(self) -> None:
        for shared in self._tables.shared.values():
            if shared.fd >= 0:
                os.close(shared.fd)
                shared.fd = -1


# ---------------------------------------------------------------- restart

class MappedObjects:
    """The files and shared objects of an image, opened on first use as service fds."""

    def __init__(self, means: MappingMeans) -> None:
        self.means = means
        self._kinds = MappingKinds()

    def kind_of(self, vma: Vma) -> MappingKind:
        """Return the kind of a mapping. ImageDamaged."""
        shared = self.means.reader.get(SharedMemory, vma.object).kind if vma.kind == SHARED_MEMORY else 0
        return self._kinds.of_record(vma.kind, shared)

    def executable(self, mm: Mm) -> int:
        """Return the fd of a program."""
        return self._kinds.of_record(FILE_PRIVATE).fd(mm.exe, self.means, writable=False)

    def shared(self, shm_id: int) -> int:
        """Return the fd of a shared object, open for reading and writing, with its content. ImageDamaged."""
        record = self.means.reader.get(SharedMemory, shm_id)
        return self._kinds.of_record(SHARED_MEMORY, record.kind).fd(shm_id, self.means, writable=True)

    def seal(self) -> None:
        """Set the state of objects that would prevent mapping them, when everything is mapped."""
        for kind in self._kinds.all:
            kind.seal(self.means)

    def finish(self) -> None:
        """Set the state of objects that cannot be undone, or that needs all users."""
        for kind in self._kinds.all:
            kind.finish(self.means)


def lacks(context: MappingCheck) -> Iterator[Finding]:
    """Yield the reasons why this machine cannot map an image."""
    kinds: list[MappingKind | RegionKind] = [*MappingKinds().all, *REGIONS]
    for kind in kinds:
        yield from kind.lacks(context)
    yield from seals.lacks(context)


def seal_mappings(vmas: Iterable[Vma], script: Script) -> None:
    """Seal mappings again, as the last change of them."""
    seals.restore(vmas, script)


def restart_findings(context: MappingCheck) -> Iterator[Finding]:
    """Yield the reasons why the objects behind the mappings of an image cannot be had again."""
    kinds = MappingKinds()
    found = {(vma.kind, 0) for vma in context.reader.every(Vma) if vma.kind != SHARED_MEMORY}
    found |= {(SHARED_MEMORY, shared.kind) for shared in context.reader.every(SharedMemory)}
    for number, object_kind in sorted(found):
        try:
            kinds.of_record(number, object_kind)
        except ImageDamaged as error:
            yield about(0, 'memory', 'EBADMSG', error.message, error.hint)
    for kind in kinds.all:
        yield from kind.restart_findings(context)


def needs(reader: ImageReader, lookup: FileLookup) -> Iterator[Needs]:
    """Yield what is needed to make the objects behind mappings again."""
    for kind in MappingKinds().all:
        yield from kind.needs(reader, lookup)
