# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decide which requests may join the queue. A user may not have too many, and no two jobs may freeze one tree. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from ckptd.errors import Busy, InvalidArgument, LimitsExceeded
from ckptd.jobs.state import JobRecord
from ckptd.protocol.requests import CheckpointRequest, HoldRequest, JobRequest
from ckptd.target import Target

Overlap = Callable[[Target, Target], bool]     # whether two targets share tasks (overlap.py)
Sees = Callable[[int], bool]             # whether the asker may know of objects that belong to a uid
Exclusive = CheckpointRequest | HoldRequest      # requests that need the tree for themselves


def refuse_too_many(request: JobRequest, others: Sequence[int], limit: int, in_all: int) -> None:
    """Check the limits on jobs and freezes: `limit` for each user except root, `in_all` for the daemon. others: for
    each job and freeze, the uid of the user who asked for it. LimitsExceeded."""
    uid = request.asked_by
    own = others.count(uid)
    if uid and len(others) >= in_all:
        raise LimitsExceeded(f'there are {len(others)} jobs and freezes, which is the limit', resource='MaxQueuedJobs',
                             hint='try again later')
    if uid and own >= limit:
        raise LimitsExceeded(f'uid {uid} has {own} jobs and freezes, which is the limit', resource='MaxJobsPerUser',
                             hint='wait for the jobs (ckptctl jobs) or thaw frozen targets')


def refuse_active(target: Target, active: Iterable[JobRecord], overlap: Overlap, sees: Sees) -> None:
    """Check that no job freezes, or will freeze, tasks of this target. The error names the job only if the asker may
    see it. Busy."""
    for job in active:
        if isinstance(job.request, Exclusive) and overlap(job.request.target, target):
            what = f'{job.name} works on {job.request.target}' if sees(job.request.asked_by) else 'a job works on it'
            raise Busy(what, resource=str(target))


def refuse_conflict(request: JobRequest, active: Iterable[JobRecord], held: Mapping[Target, int],
                    overlap: Overlap) -> None:
    """Check that the request conflicts with no job and no held freeze. Busy. held: targets, each with the uid of the
    user who asked for the freeze; only that user and root get its name.

    A checkpoint of exactly the held target is allowed: a caller may freeze, look, and then dump.
    """
    if not isinstance(request, Exclusive):
        return

    def sees(owner: int) -> bool:
        return request.asked_by in (0, owner)

    refuse_active(request.target, active, overlap, sees)
    for target, owner in held.items():
        exact = request.target == target and isinstance(request, CheckpointRequest) and request.after != 'freeze'
        if not exact and overlap(target, request.target):
            if not sees(owner):
                raise Busy(f'a part of {request.target} is held frozen already', resource=str(request.target),
                           hint='ask the user who froze it to thaw it')
            raise Busy(f'{target} is held frozen already', resource=str(request.target), hint=f'thaw {target} first')


def refuse_token(token: str, known: Iterable[JobRecord]) -> None:
    """Check that no other job uses this token as its path. InvalidArgument."""
    if token and any(job.token == token for job in known):
        raise InvalidArgument('the handle_token is in use', resource='handle_token', hint='choose another token')
