# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which requests may join the queue: not too many of one user, never two at work on one tree. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from ckptd.errors import Busy, InvalidArgument, LimitsExceeded
from ckptd.jobs.state import JobRecord
from ckptd.protocol.messages import JobRequest

Overlap = Callable[[str, str], bool]     # of two targets, overlap.py
Sees = Callable[[int], bool]             # whether what belongs to a uid is known to who asks
EXCLUSIVE = frozenset({'checkpoint', 'freeze'})      # who has the tree for itself


def refuse_too_many(request: JobRequest, others: Sequence[int], limit: int, in_all: int) -> None:
    """LimitsExceeded when a user (never root) has `limit` jobs and freezes already, or all have `in_all`. others: the
    uid of who asked for each."""
    uid = request.asked_by
    own = others.count(uid)
    if uid and len(others) >= in_all:
        raise LimitsExceeded(f'there are {len(others)} jobs and freezes already', resource='MaxQueuedJobs',
                             hint='try again later')
    if uid and own >= limit:
        raise LimitsExceeded(f'uid {uid} has {own} jobs and freezes already', resource='MaxJobsPerUser',
                             hint='wait for them (ckptctl jobs) or thaw what is frozen')


def refuse_active(target: str, active: Iterable[JobRecord], overlap: Overlap, sees: Sees) -> None:
    """Busy while a job freezes tasks of this target, or will; which one it is only where that may be seen."""
    for job in active:
        if job.request.operation in EXCLUSIVE and overlap(job.request.target, target):
            what = f'{job.name} works on {job.request.target}' if sees(job.request.asked_by) else 'a job works on it'
            raise Busy(what, resource=target)


def refuse_conflict(request: JobRequest, active: Iterable[JobRecord], held: Mapping[str, int],
                    overlap: Overlap) -> None:
    """Busy when the request would freeze what another freezes, or hold what is held. held: and the uid of who asked for
    it, to whom and to root alone it is named.

    A checkpoint of exactly what is held is welcome: a caller may well freeze, look, and then dump.
    """
    if request.operation not in EXCLUSIVE:
        return

    def sees(owner: int) -> bool:
        return request.asked_by in (0, owner)

    refuse_active(request.target, active, overlap, sees)
    for target, owner in held.items():
        exact = request.target == target and request.operation == 'checkpoint' and request.after != 'freeze'
        if not exact and overlap(target, request.target):
            if not sees(owner):
                raise Busy(f'a part of {request.target} is held frozen already', resource=request.target,
                           hint='have whoever froze it thaw it')
            raise Busy(f'{target} is held frozen already', resource=request.target, hint=f'thaw {target} first')


def refuse_token(token: str, known: Iterable[JobRecord]) -> None:
    """InvalidArgument for a path that another job has."""
    if token and any(job.token == token for job in known):
        raise InvalidArgument('the handle_token is in use', resource='handle_token', hint='take another')
