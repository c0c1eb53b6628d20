# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl jobs and ckptctl cancel."""

import asyncio
import time
from typing import Any

from ckptd.bus.names import JOB
from ckptd.cli.output import Column
from ckptd.cli.quantities import USEC_PER_SEC, format_timespan
from ckptd.cli.session import DaemonProxy, Session
from ckptd.errors import CkptError, NoSuchJob

COLUMNS = (Column('JOB', right=True, style='bold'), Column('OPERATION'), Column('TARGET', fold=True), Column('STATE'),
           Column('PHASE'), Column('DONE', right=True), Column('FOR', right=True), Column('UID', right=True))


async def jobs(session: Session) -> int:
    """List jobs, including those that ended recently."""
    async with session.daemon() as daemon:
        listed = await daemon.manager('ListJobs')
        details = await asyncio.gather(*[_details(daemon, row[1]) for row in listed])
    rows = [{'job': number, 'path': path, 'operation': operation, 'target': target, 'state': state, **extra}
            for (number, path, operation, target, state), extra in zip(listed, details, strict=True)]
    if session.out.json:
        session.out.document(rows)
    else:
        session.out.table(COLUMNS, [_cells(row) for row in rows], empty='No jobs.', what='jobs')
    return 0


async def cancel(session: Session) -> int:
    """Cancel each job. The first failure is reported after all were tried."""
    failures: list[CkptError] = []
    cancelled = []
    async with session.daemon() as daemon:
        paths = {row[0]: row[1] for row in await daemon.manager('ListJobs')}
        for number in session.args.jobs:
            try:
                await _cancel_one(daemon, number, paths.get(number))
                cancelled.append(number)
            except CkptError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    if session.out.json:
        session.out.document({'cancelled': cancelled})
    for number in cancelled:
        session.out.line(f'job {number} cancelled')
    return 0


async def _cancel_one(daemon: DaemonProxy, number: int, path: str | None) -> None:
    if path is None:
        raise NoSuchJob(f'no job {number}')
    await daemon.call(path, JOB, 'Cancel', 'a{sv}', {})


async def _details(daemon: DaemonProxy, path: str) -> dict[str, Any]:
    """Return what ListJobs leaves out, or nothing if the job's object was removed meanwhile."""
    try:
        job = await daemon.job_properties(path)
    except CkptError:
        return {}
    return {'phase': job['Phase'], 'progress': job['Progress'], 'image': job['Image'], 'uid': job['StartedByUID'],
            'start_time': job['StartTime']}


def _cells(row: dict[str, Any]) -> list[str]:
    started = row.get('start_time', 0)
    age = max(int(time.time() * USEC_PER_SEC) - started, 0)
    return [str(row['job']), row['operation'], row['target'], row['state'], row.get('phase', ''),
            f'{row.get("progress", 0) * 100:.0f}%', format_timespan(age) if started else '', str(row.get('uid', ''))]
