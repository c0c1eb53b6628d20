# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal of the names that a checkpoint gives to deleted files, until its image is published."""

from typing import Self

from ckptd.errors import CkptError
from ckptd.journal.actions import Actions, FaultPoint, no_fault, undo_all
from ckptd.journal.entry import JournalEntry
from ckptd.journal.steps import LinkFile
from ckptd.journal.store import Journal


class NameJournal:
    """Owner of one journal entry, which is begun with the first name. `with` takes all names away again, unless `keep`
    was called. Who dies in between leaves the entry to a recovery, which looks whether the image was published."""

    def __init__(self, journal: Journal, job: int, target: str, at: FaultPoint = no_fault) -> None:
        self._journal, self._job, self._target, self._at = journal, job, target, at
        self._entry: JournalEntry | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, step: LinkFile) -> None:
        """Write a name down before it is given. CkptError if the journal cannot be written."""
        if self._entry is None:
            self._entry = self._journal.begin(self._job, self._target, 'names')
        self._entry.add(step)

    def keep(self) -> None:
        """The image is published: from here on it has the names."""
        if self._entry is not None:
            self._entry.finish()

    def close(self) -> None:
        """CkptError where a name cannot be taken away: the journal keeps it for a recovery."""
        entry, self._entry = self._entry, None
        if entry is None or entry.closed:
            return
        try:
            failures = undo_all(entry, Actions(None), self._at)
        finally:
            entry.close()
        if failures:
            raise CkptError('; '.join(failures), phase='release', hint='the daemon tries again when it starts')
