# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of records against each other: ids that must exist, ranges in order, extents inside their files."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast, get_args

from ckptd.image.grammar import Codec, Record, Struct
from ckptd.image.manifest import NAME, Manifest
from ckptd.image.records import (
    CHUNK,
    FILE_PRIVATE,
    FILE_SHARED,
    OF_MM,
    OF_SHARED_MEMORY,
    PAGE,
    PARTS,
    SHARED_MEMORY,
    Backing,
    Credentials,
    Extent,
    FdTable,
    Fs,
    GuardRegions,
    Header,
    Mm,
    PageRuns,
    Registers,
    SavedFile,
    SharedMemory,
    SignalActions,
    TaskAttribute,
    TaskIds,
    TaskRecord,
    ThreadSignals,
    Vma,
    data_name,
)
from ckptd.image.shapes import flaws, tree_flaws

MAX_DAMAGES = 1000

# field of a record: the class of the record whose id it contains; 0 means none
_REFERENCES: dict[type[Record], dict[str, type[Record]]] = {
    TaskRecord: {'mm_id': Mm, 'files_id': FdTable, 'fs_id': Fs, 'sighand_id': SignalActions, 'parent': TaskRecord},
    Mm: {'exe': Backing},
    Vma: {'mm_id': Mm},
    GuardRegions: {'mm_id': Mm},
}
_OBJECTS: dict[int, type[Record]] = {FILE_PRIVATE: Backing, FILE_SHARED: Backing, SHARED_MEMORY: SharedMemory}
_OWNERS: dict[int, type[Record]] = {OF_MM: Mm, OF_SHARED_MEMORY: SharedMemory}
# TaskAttribute.scope: the class of its owner
_SCOPES: dict[int, type[Record]] = {1: Mm, 2: SignalActions, 3: Fs, 4: TaskRecord, 5: TaskRecord}
_MANY = (Header, TaskIds, Vma, PageRuns, GuardRegions, TaskAttribute)      # their first field is not an id of their own
_OF_LIVING = (Registers, Credentials, ThreadSignals)
_DEAD = (ord('Z'), ord('X'))


class RecordChecker:
    """A checker that takes all records of an image in order and lists inconsistencies. `sizes`: bytes by file name."""

    def __init__(self, sizes: dict[str, int], damages: list[str]) -> None:
        self.sizes = sizes
        self._damages = damages
        self._ids: dict[type[Record], set[int]] = {}
        self._uses: set[tuple[str, type[Record], int]] = set()
        self._ends: dict[object, int] = {}
        self._headers: list[Header] = []
        self._attributes: set[tuple[int, int, str]] = set()     # scope, owner, name
        self._listed: list[tuple[int, int]] = []        # vpid, vtgid
        self._parents: dict[int, int] = {}
        self._leaders = 0
        self._checks: dict[type[Record], Callable[[Any], None]] = {
            Header: self._headers.append, TaskIds: self._check_ids, TaskRecord: self._check_task,
            FdTable: self._check_fds,
            Vma: self._check_vma, PageRuns: self._check_runs, GuardRegions: self._check_guards,
            Backing: self._check_backing, TaskAttribute: self._check_attribute,
        }

    def _damage(self, text: str) -> None:
        if len(self._damages) < MAX_DAMAGES:
            self._damages.append(text)

    def add(self, one: Record) -> None:
        """Check one record on its own, and remember its id and its references."""
        cls = type(one)
        first = cls._codec.fields[0].name
        key = getattr(one, first)
        where = f'{cls.__name__} {key}' if isinstance(key, int) else cls.__name__
        if cls not in _MANY:
            known = self._ids.setdefault(cls, set())
            if key in known or not key:
                self._damage(f'{where}: its id is {"taken" if key else "0"}')
            known.add(key)
        if first == 'vpid' and cls not in (TaskRecord, TaskIds):
            self._use(where, TaskRecord, key)
        for name, target in _REFERENCES.get(cls, {}).items():
            self._use(where, target, getattr(one, name))
        for extent in _extents(one):
            self._check_extent(where, extent.part, extent.offset, extent.length)
        if check := self._checks.get(cls):
            check(one)
        for flaw in flaws(one):
            self._damage(f'{where}: {flaw}')

    def _use(self, where: str, target: type[Record], key: int) -> None:
        if key:
            self._uses.add((where, target, key))

    # ------------------------------------------------------------ records one by one

    def _check_attribute(self, one: TaskAttribute) -> None:
        where, key = f'TaskAttribute {one.name} of {one.owner}', (one.scope, one.owner, one.name)
        if one.scope not in _SCOPES or not one.owner:
            self._damage(f'{where}: it belongs to nothing')
            return
        if key in self._attributes:
            self._damage(f'{where}: it is there twice')
        self._attributes.add(key)
        self._use(where, _SCOPES[one.scope], one.owner)

    def _check_ids(self, ids: TaskIds) -> None:
        lists = (ids.vpid, ids.vtgid, ids.vppid, ids.vpgid, ids.vsid)
        if len({len(one) for one in lists}) != 1 or len(ids.vpid) > CHUNK:
            self._damage(f'TaskIds: lists of {", ".join(str(len(one)) for one in lists)} ids')
        self._listed += zip(ids.vpid, ids.vtgid, strict=False)
        self._leaders += sum(vpid == vtgid for vpid, vtgid in zip(ids.vpid, ids.vtgid, strict=False))
        for vtgid in ids.vtgid:
            self._use('TaskIds', TaskRecord, vtgid)

    def _check_task(self, task: TaskRecord) -> None:
        self._parents[task.vpid] = task.parent
        if task.state not in _DEAD:
            for cls in _OF_LIVING:
                self._use(f'TaskRecord {task.vpid}', cls, task.vpid)

    def _check_fds(self, table: FdTable) -> None:
        for fd in table.fds:
            self._use(f'FdTable {table.files_id}: fd {fd.fd}', SavedFile, fd.file_id)

    def _check_vma(self, vma: Vma) -> None:
        where = f'Vma {vma.start:x}-{vma.end:x} of mm {vma.mm_id}'
        self._check_range(where, (Vma, vma.mm_id), vma.start, vma.end)
        if target := _OBJECTS.get(vma.kind):
            self._use(where, target, vma.object)

    def _check_backing(self, backing: Backing) -> None:
        if '\0' in backing.path:
            self._damage(f'Backing {backing.backing_id}: path has a zero byte')

    def _check_guards(self, guards: GuardRegions) -> None:
        for one in guards.ranges:
            where = f'GuardRegions {one.start:x}-{one.end:x} of mm {guards.mm_id}'
            self._check_range(where, (GuardRegions, guards.mm_id), one.start, one.end)

    def _check_runs(self, runs: PageRuns) -> None:
        target = _OWNERS.get(runs.owner_kind)
        if target is None:
            self._damage(f'PageRuns of {runs.owner}: owner kind {runs.owner_kind}')
            return
        where = f'PageRuns of {target.__name__} {runs.owner}'
        self._use(where, target, runs.owner)
        for run in runs.runs:
            length = run.pages * PAGE
            self._check_range(where, (PageRuns, target, runs.owner), run.start, run.start + length)
            self._check_extent(where, run.part, run.offset, length)

    def _check_range(self, where: str, sequence: object, start: int, end: int) -> None:
        """Check a range: whole pages, not empty, and after the previous one of the sequence."""
        if start % PAGE or end % PAGE or start >= end or end > 1 << 64:
            self._damage(f'{where}: not a range of pages')
        elif start < self._ends.get(sequence, 0):
            self._damage(f'{where}: {start:x} is not in ascending order')
        self._ends[sequence] = max(end, self._ends.get(sequence, 0))

    def _check_extent(self, where: str, part: int, offset: int, length: int) -> None:
        name = data_name(part)
        if offset % PAGE:
            self._damage(f'{where}: byte {offset} of {name} is not a page boundary')
        elif offset + length > self.sizes.get(name, 0):
            self._damage(f'{where}: bytes {offset} to {offset + length} are not in {name}')

    # ------------------------------------------------------------ all together

    def finish(self, manifest: Manifest | None) -> None:
        """Check the whole image: references to missing records, and counts."""
        for where, target, key in sorted(self._uses, key=lambda use: (use[0], use[1].tag, use[2])):
            if key not in self._ids.get(target, ()):
                self._damage(f'{where}: no {target.__name__} {key}')
        tasks = self._ids.get(TaskRecord, set())
        if len(self._headers) != 1:
            self._damage(f'{PARTS["TREE"]}: {len(self._headers)} headers')
        listed = [vpid for vpid, _ in self._listed]
        if len(listed) != len(set(listed)) or set(listed) != tasks:
            self._damage(f'{PARTS["TREE"]}: TaskIds and TaskRecord records differ')
        else:
            # a parent that is not a task was reported above
            for flaw in tree_flaws((vpid, vtgid, parent if (parent := self._parents[vpid]) in tasks else 0)
                                   for vpid, vtgid in self._listed):
                self._damage(f'{PARTS["TREE"]}: {flaw}')
        said = [('header', one) for one in self._headers] + ([(NAME, manifest)] if manifest else [])
        for name, one in cast(list[tuple[str, Header | Manifest]], said):
            if (one.tasks, one.processes) != (len(tasks), self._leaders):
                self._damage(f'{name}: {one.tasks} tasks in {one.processes} processes, '
                             f'but there are {len(tasks)} in {self._leaders}')
            if one.root not in tasks:
                self._damage(f'{name}: the root {one.root} is not a task of the image')


def _extents(value: Struct) -> Iterator[Extent]:
    """Yield the extents among the fields of a record."""
    for name in _extent_fields(value._codec):
        content = getattr(value, name)
        yield from content if isinstance(content, tuple) else (content,)


@cache
def _extent_fields(codec: Codec) -> tuple[str, ...]:
    """Return the names of the fields that are an extent or a list of them."""
    return tuple(name for name, hint in codec.hints.items() if hint is Extent or Extent in get_args(hint))
