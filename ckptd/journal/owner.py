# SPDX-License-Identifier: LGPL-2.1-or-later
"""The owner of a journal entry for steps that stand until they are kept or undone."""

from typing import Self

from ckptd.errors import CkptError
from ckptd.journal.entry import FaultPoint, JournalEntry, no_fault
from ckptd.journal.steps import AnyStep, StepContext
from ckptd.journal.store import Journal


class StepJournal:
    """Owner of one journal entry, which begins with the first step.

    `with` undoes all steps, unless `finish` was called. If the owner dies in between, a recovery undoes them.
    """

    def __init__(self, journal: Journal, job: int, target: str, mode: str, at: FaultPoint = no_fault) -> None:
        self._journal, self._job, self._target, self._mode, self._at = journal, job, target, mode, at
        self._entry: JournalEntry | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_empty(self) -> bool:
        """Whether no step stands."""
        return self._entry is None

    def note(self, step: AnyStep) -> None:
        """Write a step down before it is taken. CkptError if the journal cannot be written."""
        if self._entry is None:
            self._entry = self._journal.begin(self._job, self._target, self._mode)
        self._entry.add(step)

    def finish(self) -> None:
        """Forget the steps: they are to stay, or were undone."""
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.finish()

    def close(self) -> None:
        """Undo the steps. CkptError if one cannot be undone: the journal keeps it for a recovery."""
        entry, self._entry = self._entry, None
        if entry is None:
            return
        try:
            failures = entry.undo(StepContext(None), self._at)
        finally:
            entry.close()
        if failures:
            raise CkptError('; '.join(failures), phase='release', hint='the daemon tries again when it starts')
