# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job as data: its states, phases, progress and expected end. Pure; the caller provides the time.

    queued --start--> running --finish--> done
       |                 |------fail----> failed
       |                 '------cancel--> cancelled
       '---cancel/fail--------^

Progress is a share of the whole, 0 to 1, and never decreases. Each phase owns a slice of it. Inside its slice a phase
advances with the tasks or bytes that the worker reports.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from ckptd.errors import Cancelled, CkptError
from ckptd.protocol.messages import ProgressReport
from ckptd.protocol.requests import Request

NOTHING = ProgressReport(0, 0, 0, 0)


class State(StrEnum):
    QUEUED = 'queued'
    RUNNING = 'running'
    DONE = 'done'
    FAILED = 'failed'
    CANCELLED = 'cancelled'


NEXT: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.FAILED, State.CANCELLED}),
    State.RUNNING: frozenset({State.DONE, State.FAILED, State.CANCELLED}),
    State.DONE: frozenset(), State.FAILED: frozenset(), State.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a job's progress that a phase owns, and the unit that advances it."""
    start: float
    end: float
    unit: Literal['tasks', 'bytes', 'none'] = 'none'

    def at(self, progress: ProgressReport) -> float:
        """Return the job's progress for a report of the worker during the phase; `start` while totals are unknown."""
        done, total = {'tasks': (progress.tasks_done, progress.tasks_total),
                       'bytes': (progress.bytes_done, progress.bytes_total), 'none': (0, 0)}[self.unit]
        return self.start + (self.end - self.start) * min(done / total, 1.0) if total else self.start


# In large trees memory takes most of the time: copying it, then digests and the disk.
CHECKPOINT: dict[str, Slice] = {
    'resolve': Slice(0.0, 0.01), 'scan': Slice(0.01, 0.03), 'freeze': Slice(0.03, 0.05), 'rescan': Slice(0.05, 0.06),
    'seize': Slice(0.06, 0.08, 'tasks'), 'state': Slice(0.08, 0.12, 'tasks'), 'memory': Slice(0.12, 0.75, 'bytes'),
    'release': Slice(0.75, 0.76), 'write': Slice(0.76, 0.98, 'bytes'), 'publish': Slice(0.98, 1.0),
}
# Nothing is left to do once the tree runs. The job waits for its end.
RESTORE: dict[str, Slice] = {
    'verify': Slice(0.0, 0.10, 'bytes'), 'plan': Slice(0.10, 0.13), 'open': Slice(0.13, 0.15),
    'create': Slice(0.15, 0.20, 'tasks'), 'fill': Slice(0.20, 0.88, 'bytes'), 'rebuild': Slice(0.88, 0.97, 'tasks'),
    'start': Slice(0.97, 1.0), 'attend': Slice(1.0, 1.0),
}
IMPORT: dict[str, Slice] = {
    'receive': Slice(0.0, 0.60, 'bytes'), 'verify': Slice(0.60, 0.99, 'bytes'), 'publish': Slice(0.99, 1.0),
}
# by operation; all others have the phases of a checkpoint, or none
SLICES = {'import': IMPORT, 'restore': RESTORE, 'check-restore': RESTORE}


@dataclass(slots=True, eq=False)
class JobRecord:
    """A job. Times are seconds of a monotonic clock unless stated otherwise."""
    number: int
    request: Request
    start_time: int    # time of the request, microseconds of the real-time clock
    token: str = ''    # a second name, chosen by the caller; or ''
    state: State = State.QUEUED
    phase: str = ''
    counts: ProgressReport = NOTHING
    progress: float = 0.0
    expected_end: int = 0    # microseconds of the real-time clock, 0 while unknown
    error: CkptError | None = None
    result: dict[str, Any] = field(default_factory=dict)
    worker: int = 0    # pid of its process, or 0
    root: int = 0      # pid of the root of the restored tree that runs, or 0
    _began: float = 0.0
    _phase_began: float = 0.0
    _phase_from: float = 0.0

    @property
    def name(self) -> str:
        """Return 'job 3', or 'scan of pid:12' for an operation that is not announced as a job (number 0)."""
        return f'job {self.number}' if self.number else f'{self.request.operation} of {self.request.about}'

    @property
    def over(self) -> bool:
        return not NEXT[self.state]

    @property
    def _slices(self) -> dict[str, Slice]:
        return SLICES.get(self.request.operation, CHECKPOINT)

    def _to(self, state: State) -> None:
        if state not in NEXT[self.state]:
            raise RuntimeError(f'job {self.number} cannot go from {self.state} to {state}')
        self.state = state

    def start(self, now: float) -> None:
        self._to(State.RUNNING)
        self._began = self._phase_began = now

    def enter(self, phase: str, now: float) -> None:
        """Enter a phase. An unknown phase is shown, but does not change the progress."""
        self.phase = phase
        if phase in self._slices:
            self.progress = max(self.progress, self._slices[phase].start)
        self._phase_began, self._phase_from = now, self.progress

    def advance(self, counts: ProgressReport, now: float) -> None:
        self.counts = counts
        if self.phase in self._slices:
            self.progress = max(self.progress, self._slices[self.phase].at(counts))
        self.expected_end = self._expect(now) or self.expected_end

    def _expect(self, now: float) -> int:
        """Return the real-time microseconds at which the rest is done at the speed of this phase; 0 while unknown.

        The speed of the phase is used rather than that of the whole job. The slices are shares of a typical job, so a
        steady rate of copying gives a steady estimate however long the freeze took.
        """
        gained, spent = self.progress - self._phase_from, now - self._phase_began
        if gained <= 0 or spent <= 0:
            return 0
        return self.start_time + round((now - self._began + (1.0 - self.progress) * spent / gained) * 1e6)

    def finish(self, result: dict[str, Any]) -> None:
        self._to(State.DONE)
        self.progress, self.result = 1.0, result

    def fail(self, error: CkptError) -> None:
        """Mark the job as failed or, if the error says so, as cancelled. An error without a phase gets the job's
        phase."""
        self._to(State.CANCELLED if isinstance(error, Cancelled) else State.FAILED)
        error.phase = error.phase or self.phase
        self.error = error
