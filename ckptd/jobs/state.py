# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job as data: its states, its phases, its progress and when it should end. Pure; the caller brings the clock.

    queued --start--> running --finish--> done
       |                 |------fail----> failed
       |                 '------cancel--> cancelled
       '---cancel/fail--------^

Progress is a share of the whole, 0 to 1, and never goes back. Each phase owns a slice of it; inside its slice a phase
moves by the tasks or the bytes that the worker reports.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from ckptd.errors import Cancelled, CkptError
from ckptd.protocol.messages import JobRequest, ProgressReport

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
    """The part of a job's progress that a phase owns, and what moves it inside."""
    start: float
    end: float
    unit: Literal['tasks', 'bytes', 'none'] = 'none'

    def at(self, progress: ProgressReport) -> float:
        """The job's progress when the worker reports this during the phase; `start` while nothing is known."""
        done, total = {'tasks': (progress.tasks_done, progress.tasks_total),
                       'bytes': (progress.bytes_done, progress.bytes_total), 'none': (0, 0)}[self.unit]
        return self.start + (self.end - self.start) * min(done / total, 1.0) if total else self.start


# Memory takes the time in any tree worth watching: copying it, then digests and the disk.
CHECKPOINT: dict[str, Slice] = {
    'resolve': Slice(0.0, 0.01), 'scan': Slice(0.01, 0.03), 'freeze': Slice(0.03, 0.05), 'rescan': Slice(0.05, 0.06),
    'seize': Slice(0.06, 0.08, 'tasks'), 'state': Slice(0.08, 0.12, 'tasks'), 'memory': Slice(0.12, 0.75, 'bytes'),
    'release': Slice(0.75, 0.76), 'write': Slice(0.76, 0.98, 'bytes'), 'publish': Slice(0.98, 1.0),
}
# Nothing is left to do once the tree runs; its end is waited for.
RESTORE: dict[str, Slice] = {
    'verify': Slice(0.0, 0.10, 'bytes'), 'plan': Slice(0.10, 0.13), 'open': Slice(0.13, 0.15),
    'create': Slice(0.15, 0.20, 'tasks'), 'fill': Slice(0.20, 0.88, 'bytes'), 'rebuild': Slice(0.88, 0.97, 'tasks'),
    'place': Slice(0.97, 0.99), 'start': Slice(0.99, 1.0), 'attend': Slice(1.0, 1.0),
}
IMPORT: dict[str, Slice] = {
    'receive': Slice(0.0, 0.60, 'bytes'), 'verify': Slice(0.60, 0.99, 'bytes'), 'publish': Slice(0.99, 1.0),
}
# by operation; all others have phases of a checkpoint, or none
SLICES = {'import': IMPORT, 'restore': RESTORE, 'check-restore': RESTORE}


@dataclass(slots=True, eq=False)
class JobRecord:
    """start_time: microseconds of the real-time clock when the job was asked for; every other time is a `now` in
    seconds of a monotonic clock. token: another name for it, that its caller chose, or ''.
    worker: pid of its process, or 0. root: of the tree that it restored and that runs, or 0."""
    number: int
    request: JobRequest
    start_time: int
    token: str = ''
    state: State = State.QUEUED
    phase: str = ''
    counts: ProgressReport = NOTHING
    progress: float = 0.0
    expected_end: int = 0
    error: CkptError | None = None
    result: dict[str, Any] = field(default_factory=dict)
    worker: int = 0
    root: int = 0
    _began: float = 0.0
    _phase_began: float = 0.0
    _phase_from: float = 0.0

    @property
    def name(self) -> str:
        """'job 3', or 'scan of pid:12' for what is no job to anybody but its caller (number 0)."""
        return f'job {self.number}' if self.number else f'{self.request.operation} of {self.request.target}'

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
        """A new phase. One that this daemon does not know is shown, and leaves the progress where it is."""
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
        """Real-time microseconds at which the rest is done at the speed of this phase; 0 while that is unknown.

        The speed of the phase and not of the whole job: the slices are shares of a typical job, and memory at a
        steady rate then gives a steady estimate however long the freeze took.
        """
        gained, spent = self.progress - self._phase_from, now - self._phase_began
        if gained <= 0 or spent <= 0:
            return 0
        return self.start_time + round((now - self._began + (1.0 - self.progress) * spent / gained) * 1e6)

    def finish(self, result: dict[str, Any]) -> None:
        self._to(State.DONE)
        self.progress, self.result = 1.0, result

    def fail(self, error: CkptError) -> None:
        """Failed, or cancelled if that is what the error says. An error without a phase gets the job's."""
        self._to(State.CANCELLED if isinstance(error, Cancelled) else State.FAILED)
        error.phase = error.phase or self.phase
        self.error = error
