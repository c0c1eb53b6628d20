# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check open files: refusals of their kinds, and files with an end outside of the tree."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from ckptd.errors import Finding
from ckptd.inspect.checks.rows import guarded, processes
from ckptd.inspect.proc_cache import ProcCache
from ckptd.kernel.kcmp import KCMP_FILES, kcmp
from ckptd.objects.files.base import Endpoint, FileEnd, Kind, OpenFile, finding
from ckptd.tree import Task


def check_files(tasks: Iterable[Task], cache: ProcCache) -> list[Finding]:
    """List one row for each refused fd, resource 'fd N'. The same warning about the same file appears once in the
    tree."""
    tasks = list(tasks)
    tables = list(fd_tables(tasks))
    cache.kinds.tables.tasks = frozenset(task.tid for task in tasks)
    cache.kinds.tables.table_owners = tuple(task.tid for task in tables)
    check = _Check(cache)
    for task in tables:
        check.rows += guarded(task, 'fd', check.table, task)
    return check.rows + check.lacking()


def fd_tables(tasks: Iterable[Task]) -> Iterator[Task]:
    """Yield one thread for each fd table of a process. Threads without CLONE_FILES are rare and legal."""
    for process in processes(tasks):
        yield process.reader
        for thread in process.threads:
            try:
                if thread is not process.reader and kcmp(process.reader.tid, thread.tid, KCMP_FILES):
                    yield thread
            except OSError:
                continue        # it is exiting, which another check reports


class _Verdict(NamedTuple):
    kind: Kind[Any]
    reasons: list[Finding]
    endpoint: Endpoint | None
    of_one: str     # the file in /proc, if the verdict is about this one only


class _Check:
    """One check of a tree. Files that are alike in everything that their kind considers get one verdict."""

    def __init__(self, cache: ProcCache) -> None:
        self._cache = cache
        self.rows: list[Finding] = []
        self._verdicts: dict[tuple[Any, ...], _Verdict] = {}
        self._warned: set[tuple[str, str, str]] = set()
        self._tasks: dict[int, Task] = {}
        self._ends: dict[Kind[Any], list[FileEnd]] = {}
        self._holders: dict[int, tuple[Task, int]] = {}     # of files in flight: by our fd, the fd where it was found

    def table(self, task: Task) -> list[Finding]:
        """List rows of one fd table."""
        found: list[Finding] = []
        self._tasks[task.tid] = task
        for file in self._cache.files(task):
            with suppress(FileNotFoundError):       # closed since it was listed
                found += self._rows(task, file)
        return found

    def _rows(self, task: Task, file: OpenFile) -> list[Finding]:
        verdict = self._verdict(file)
        if verdict.endpoint:
            self._ends.setdefault(verdict.kind, []).append(FileEnd(file, verdict.endpoint))
        found = [row for reason in verdict.reasons if (row := self._row(task, file, reason, verdict.of_one))]
        return found + (self._in_flight(task, file, verdict.kind) if self._cache.at_rest else [])

    def _in_flight(self, task: Task, file: OpenFile, kind: Kind[Any]) -> list[Finding]:
        """List rows of the files in the queue of this one, and in their queues."""
        found: list[Finding] = []
        for fd in kind.discover(file):
            if fd not in self._holders:     # a file may be in flight in itself
                self._holders[fd] = task, file.fd if file.tid == task.tid else self._holders[file.fd][1]
                found += self._rows(task, self._cache.file_in_flight(fd))
        return found

    def _row(self, task: Task, file: OpenFile, reason: Finding, of_one: str = '') -> Finding | None:
        number = self._holders[file.fd][1] if self._is_in_flight(file) else file.fd
        if reason.severity != 'refusal':
            if (key := (file.link, reason.reason, of_one)) in self._warned:
                return None
            self._warned.add(key)
        return replace(reason, pid=task.tid, comm=task.comm, resource=f'fd {number}')

    def _verdict(self, file: OpenFile) -> _Verdict:
        of_one = file.proc_path if self._cache.kinds.is_unlike_others(file) else ''
        key = (file.link, file.stat.st_dev, file.stat.st_ino, file.stat.st_rdev, file.stat.st_mode, file.flags,
               tuple(file.info.fields.get('lock', ())), of_one)
        if key not in self._verdicts:
            kind = self._cache.kinds.of(file)
            self._verdicts[key] = _Verdict(kind, kind.findings(file) + _lost_locks(kind, file), kind.endpoint(file),
                                           of_one)
        return self._verdicts[key]

    def _is_in_flight(self, file: OpenFile) -> bool:
        return file.pid == os.getpid()

    def lacking(self) -> list[Finding]:
        """List ends whose other ends are outside of the tree."""
        return [row for kind, ends in self._ends.items()
                for end, reason in kind.link(ends, is_whole=self._cache.at_rest)
                if (row := self._row(self._task_of(end.file), end.file, reason))]

    def _task_of(self, file: OpenFile) -> Task:
        return self._holders[file.fd][0] if self._is_in_flight(file) else self._tasks[file.tid]


def _lost_locks(kind: Kind[Any], file: OpenFile) -> list[Finding]:
    if 'lock' not in file.info.fields or 'locks' in kind.record.__annotations__:
        return []
    return [finding('ENOLCK', f'a lock on {file.link} is not kept', 'a restart runs without it', 'warning')]
