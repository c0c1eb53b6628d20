# SPDX-License-Identifier: LGPL-2.1-or-later
"""The job as data: transitions, progress and the expected end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import Cancelled, CkptError
from ckptd.jobs.state import CHECKPOINT, IMPORT, NEXT, RESTORE, JobRecord, Slice, State
from ckptd.protocol.messages import IMPORT_PHASES, PHASES, RESTORE_PHASES, ProgressReport
from ckptd.protocol.requests import Operation
from tests.jobs.conftest import request_of

START = 1_700_000_000_000_000


def running(now: float = 0.0, operation: Operation = 'checkpoint') -> JobRecord:
    job = JobRecord(1, request_of('any', operation), START)
    job.start(now)
    return job


@pytest.mark.parametrize(('slices', 'phases'), [(CHECKPOINT, PHASES), (RESTORE, RESTORE_PHASES),
                                               (IMPORT, IMPORT_PHASES)])
def test_every_phase_has_its_slice_and_they_join(slices: dict[str, Slice], phases: tuple[str, ...]) -> None:
    assert tuple(slices) == phases
    ends = [0.0, *(one.end for one in slices.values())]
    assert [one.start for one in slices.values()] == ends[:-1]
    assert ends[-1] == 1.0


@pytest.mark.parametrize('state', State)
def test_a_job_that_is_over_stays_so(state: State) -> None:
    job = JobRecord(1, request_of('any'), START, state=state)
    assert job.over == (state in ('done', 'failed', 'cancelled'))
    for other in State:
        if other not in NEXT[state]:
            with pytest.raises(RuntimeError, match='cannot go'):
                job._to(other)


def test_a_cancelled_job_is_not_a_failed_one() -> None:
    job = running()
    job.enter('memory', 1)
    job.fail(Cancelled('stop'))
    assert (job.state, job.error and job.error.phase) == (State.CANCELLED, 'memory')
    other = running()
    other.fail(CkptError('no', phase='scan'))
    assert (other.state, other.error and other.error.phase) == (State.FAILED, 'scan')


steps = st.one_of(st.sampled_from([*CHECKPOINT, *RESTORE, *IMPORT, 'unheard-of']),
                  st.builds(ProgressReport, *[st.integers(0, 1 << 40)] * 4))


@given(st.lists(steps, max_size=40), st.sampled_from(['checkpoint', 'restore', 'import', 'export']))
def test_progress_never_goes_back_nor_above_1(walk: list[str | ProgressReport], operation: Operation) -> None:
    job, before = running(operation=operation), 0.0
    for now, step in enumerate(walk):
        if isinstance(step, ProgressReport):
            job.advance(step, now)
        else:
            job.enter(step, now)
        assert before <= job.progress <= 1.0
        before = job.progress


def test_a_phase_that_two_operations_have() -> None:
    """An import verifies when it has received all, a restart before anything else."""
    shares = {}
    for operation in ('import', 'restore'):
        job = running(operation=operation)
        job.enter('verify', 1)
        shares[operation] = job.progress
    assert shares == {'import': IMPORT['receive'].end, 'restore': 0.0}


def test_steady_memory_gives_a_steady_end() -> None:
    """100 units at 1 a second after a freeze that took a minute: the estimate is about memory, from the start."""
    job = running()
    job.enter('freeze', 0)
    job.enter('memory', 60)
    for done in (10, 50, 90):
        job.advance(ProgressReport(1, 1, done, 100), 60 + done)
        memory = CHECKPOINT['memory']
        tail = 100 * (1.0 - memory.end) / (memory.end - memory.start)
        assert job.expected_end == pytest.approx(START + (160 + tail) * 1e6, abs=1e4)


def test_no_estimate_without_a_measure() -> None:
    job = running()
    job.enter('memory', 5)
    job.advance(ProgressReport(0, 0, 0, 0), 6)
    assert job.expected_end == 0
