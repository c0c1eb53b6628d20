# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files: what their kinds refuse, and which have an end outside of the tree."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from ckptd.errors import Finding
from ckptd.inspect.checks.rows import ProcessIds, guarded, processes, refuse, warn
from ckptd.inspect.proc_cache import ProcCache
from ckptd.kernel.kcmp import KCMP_FILES, kcmp
from ckptd.objects.files.base import Endpoint, Kind, OpenFile, finding
from ckptd.objects.files.registry import kind_of
from ckptd.tree import Task


def check_files(tasks: Iterable[Task], cache: ProcCache) -> list[Finding]:
    """One row for each refused fd, resource 'fd N'. The same warning about the same file stands once for the tree."""
    check = _Check(cache)
    for process in processes(tasks):
        for task in _tables(process):
            check.rows += guarded(task, 'fd', check.table, task)
    return check.rows + check.open_ends()


def _tables(process: ProcessIds) -> Iterator[Task]:
    """One thread for each fd table of the process; threads without CLONE_FILES are rare and legal."""
    yield process.reader
    for thread in process.threads:
        try:
            if thread is not process.reader and kcmp(process.reader.tid, thread.tid, KCMP_FILES):
                yield thread
        except OSError:
            continue        # it exits; another check says so


class _Verdict(NamedTuple):
    reasons: list[Finding]
    endpoint: Endpoint | None


class _End(NamedTuple):
    task: Task
    fd: int
    link: str
    endpoint: Endpoint


class _Check:
    """One look at a tree. Files that look alike in all that a kind goes by get one verdict."""

    def __init__(self, cache: ProcCache) -> None:
        self._cache = cache
        self.rows: list[Finding] = []
        self._verdicts: dict[tuple[Any, ...], _Verdict] = {}
        self._warned: set[tuple[str, str]] = set()
        self._ends: list[_End] = []

    def table(self, task: Task) -> list[Finding]:
        """Rows of one fd table."""
        found: list[Finding] = []
        for file in self._cache.files(task):
            with suppress(FileNotFoundError):       # closed since it was listed
                found += self._rows(task, file)
        return found

    def _rows(self, task: Task, file: OpenFile) -> list[Finding]:
        verdict = self._verdict(file)
        if verdict.endpoint:
            self._ends.append(_End(task, file.fd, file.link, verdict.endpoint))
        return [row for reason in verdict.reasons if (row := self._row(task, file, reason))]

    def _row(self, task: Task, file: OpenFile, reason: Finding) -> Finding | None:
        resource = f'fd {file.fd}'
        if reason.severity == 'refusal':
            return refuse(task, resource, reason.errno, reason.reason, reason.hint)
        if (file.link, reason.reason) in self._warned:
            return None
        self._warned.add((file.link, reason.reason))
        return warn(task, resource, reason.errno, reason.reason, reason.hint)

    def _verdict(self, file: OpenFile) -> _Verdict:
        key = (file.link, file.stat.st_dev, file.stat.st_ino, file.stat.st_rdev, file.stat.st_mode, file.flags,
               tuple(file.info.fields.get('lock', ())),
               # of what watches fds it counts whose those are
               file.proc_path if 'tfd' in file.info.fields else '')
        if key not in self._verdicts:
            kind = kind_of(file)
            self._verdicts[key] = _Verdict(kind.refusals(file) + _lost_locks(kind, file), kind.endpoint(file))
        return self._verdicts[key]

    def open_ends(self) -> list[Finding]:
        """Ends that are open, and not in the tree."""
        held: dict[tuple[str, int, int], set[str]] = {}
        for end in self._ends:
            held.setdefault(end.endpoint.key, set()).update(end.endpoint.holds)
        rows: dict[tuple[str, int, int], Finding] = {}
        for task, fd, link, endpoint in self._ends:
            missing = endpoint.lacks - held[endpoint.key]
            if missing:
                reason = f'the {min(missing)} end of {link} is held outside of the tree'
                rows.setdefault(endpoint.key, warn(task, f'fd {fd}', 'EPIPE', reason,
                                                   'a restart cannot join it to that process again'))
        return list(rows.values())


def _lost_locks(kind: Kind[Any], file: OpenFile) -> list[Finding]:
    if 'lock' not in file.info.fields or 'locks' in kind.record.__annotations__:
        return []
    return [finding('ENOLCK', f'a lock on {file.link} is not kept', 'a restart runs without it', 'warning')]
