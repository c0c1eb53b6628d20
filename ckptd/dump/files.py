# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files of stopped tasks: each description once, with the fd tables that refer to it."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptd.dump.names import LinkNames
from ckptd.dump.save_files import SavedFiles
from ckptd.dump.sharing import Sharing
from ckptd.image import records
from ckptd.image.grammar import Record, Struct
from ckptd.image.pages import DataWriter
from ckptd.image.records import Extent
from ckptd.inspect.proc_cache import ProcCache
from ckptd.journal.steps import TakeStep
from ckptd.kernel.kcmp import kcmp_file
from ckptd.objects.files.base import Kind, OpenFile
from ckptd.objects.mappings.registry import MappingKinds

Note = Callable[[TakeStep], None]


class _Content:
    """The destination of a kind's content: bulk bytes and saved named files go to the data part, shared memory goes
    with the address spaces that map it."""

    def __init__(self, data: DataWriter, mappings: MappingKinds, saved: SavedFiles, files: 'FileDump',
                 ids: Mapping[int, int], names: LinkNames, note: Note | None) -> None:
        self._data, self._mappings, self._ids, self._note = data, mappings, ids, note
        self.file_id, self.found, self.every = files.id_in_flight, files.found, files.every
        self.link_back = names.link_back
        self.written, self.reads, self.save = saved.written, saved.reads, saved.save

    def add(self, chunks: Iterable[bytes]) -> Extent:
        return self._data.add(chunks)

    def shared_memory(self, file: OpenFile) -> int:
        return self._mappings.share_file(file.stat, file.link, file.proc_path)

    @property
    def is_taken(self) -> bool:
        return self._note is not None

    def note(self, step: TakeStep) -> None:
        if self._note is not None:
            self._note(step)

    def vpid(self, pid: int) -> int:
        return self._ids.get(pid, 0)


class FileDump:
    """File descriptions and fd tables of a tree.

    ids: vpid (of a task or a group) by pid, for the owners of signals. save_limit: bytes of named files to keep. note:
    journal of what `take_out` takes, None if the tree is not killed.
    """

    def __init__(self, data: DataWriter, mappings: MappingKinds, ids: Mapping[int, int], cache: ProcCache,
                 names: LinkNames, save_limit: int = 0, note: Note | None = None) -> None:
        self.saved = SavedFiles(data, save_limit)
        self._content = _Content(data, mappings, self.saved, self, ids, names, note)
        self._cache = cache
        self._ids = ids
        # files with equal flags, position and inode may share one description; kcmp(2) decides
        self._sharing = Sharing[tuple[int, int]](lambda a, b: kcmp_file(*a, *b))
        self._holders: dict[int, list[OpenFile]] = {}
        self._known: dict[tuple[int, int], int] = {}        # file_id by task and fd
        self._files: list[records.SavedFile] = []
        self._to_take: list[tuple[int, OpenFile, Kind[Any]]] = []       # index in _files, and a kind with `take`
        self.left_outside = 0       # records with something that lasts outside of the image
        self._tables: list[records.FdTable] = []
        self._dying: list[tuple[Kind[Any], OpenFile]] = []      # files with the hook `die`

    def enter(self, files_id: int, files: Iterable[OpenFile]) -> None:
        """Add the fd table of a task."""
        self._tables.append(records.FdTable(files_id, tuple(self._enter(file) for file in files)))

    def _enter(self, file: OpenFile) -> records.Fd:
        cloexec = int(bool(file.flags & os.O_CLOEXEC))
        file_id = self._known[file.tid, file.fd] = self._shared_id(file)
        self._holders.setdefault(file_id, []).append(file)
        return records.Fd(file.fd, file_id, cloexec)

    def found(self, tid: int, fd: int) -> tuple[int, OpenFile] | None:
        """Return the description behind an fd of a task, with its id."""
        file_id = self._known.get((tid, fd), 0)
        return (file_id, self._holders[file_id][0]) if file_id else None

    def every(self) -> Iterator[tuple[int, OpenFile]]:
        """Yield all descriptions with their ids."""
        return ((file_id, holders[0]) for file_id, holders in self._holders.items())

    def id_in_flight(self, fd: int) -> int:
        """Return the id of the description behind an fd of ours, which a kind has discovered."""
        file = self._cache.file_in_flight(fd)
        file_id = self._shared_id(file)
        self._holders.setdefault(file_id, [file])
        return file_id

    def _shared_id(self, file: OpenFile) -> int:
        self.saved.enter(file)
        flags = file.flags & ~os.O_CLOEXEC
        key = (file.stat.st_dev, file.stat.st_ino, flags, file.info.pos)
        file_id, _ = self._sharing.id_of((file.tid, file.fd), key)
        return file_id

    def describe(self) -> None:
        """Dump each description after all tables were added, because a kind may need every process that has it.

        Descriptions in flight are added by the kinds of the files that they are queued in, until there are no more.
        """
        done: set[int] = set()
        while todo := [file_id for file_id in self._holders if file_id not in done]:
            others = [file_id for file_id in todo if not self._cache.kinds.of(self._holders[file_id][0]).last]
            todo = others or todo
            for file_id in todo:
                self._files.append(self._describe(file_id, self._holders[file_id]))
            done.update(todo)
        self._holders.clear()
        self._cache.kinds.close()

    def _describe(self, file_id: int, holders: Sequence[OpenFile]) -> records.SavedFile:
        file = replace(holders[0], holders=tuple((other.tid, other.fd) for other in holders[1:]))
        if inherited := self._cache.kinds.inherited(file):
            return self._saved(file_id, file, *inherited)
        kind = self._cache.kinds.of(file)
        if type(kind).die is not Kind.die:
            self._dying.append((kind, file))
        record = kind.dump(file, self._content)
        if type(kind).take is not Kind.take:
            self._to_take.append((len(self._files), file, kind))
        return self._saved(file_id, file, kind.tag, record)

    def _saved(self, file_id: int, file: OpenFile, tag: str, record: Struct) -> records.SavedFile:
        owner = file.owner()
        return records.SavedFile(file_id, tag, file.flags & ~os.O_CLOEXEC, file.info.pos & (1 << 64) - 1,
                                 file.stat.st_mode, owner.type, self._ids.get(owner.pid, 0), owner.signal, file.link,
                                 record.encode(), owner.uid, owner.euid, owner.write_hint)

    @property
    def must_take_out(self) -> bool:
        """Whether a kind may have to take data out of the kernel."""
        return bool(self._to_take)

    def take_out(self) -> None:
        """Take out what cannot be read otherwise. The tree stands still, and is killed afterwards."""
        for index, file, kind in self._to_take:
            saved = self._files[index]
            record = kind.take(kind.record.decode(saved.data), file, self._content)
            self._files[index] = replace(saved, data=record.encode())
            self.left_outside += kind.leaves(record)

    def die(self) -> None:
        """Prepare the files for the end of the tree."""
        for kind, file in self._dying:
            kind.die(file)

    def records(self) -> Iterator[Record]:
        """Yield all records of files.img."""
        yield from self._files
        yield from self._tables
