# SPDX-License-Identifier: LGPL-2.1-or-later
"""From an image to a plan and all that stands in its way; nothing is touched. A dry run ends here."""

import errno
from collections.abc import Iterable

from ckptd.engine.job import Job, image_path
from ckptd.engine.messages import refusal_row
from ckptd.engine.restore.files import Access
from ckptd.engine.restore.obstacles import Obstacles
from ckptd.engine.restore.plan import Plan, make_plan, read_numbers
from ckptd.engine.restore.world import decide
from ckptd.errors import CkptError, PermissionDenied, Refusal, Refused
from ckptd.image.reader import ImageReader
from ckptd.image.verify import verify


def prepare(job: Job, reader: ImageReader) -> tuple[Plan, list[Refusal]]:
    """The plan, and every refusal and warning."""
    request = job.request
    world = decide(reader, new_pidns=request.new_pidns)
    plan = make_plan(reader, world, read_numbers(reader, world), own_session=job.terminal >= 0,
                     child_of_us=request.wait)
    access = Access(reader, request.caller, request.changed_files, job.terminal)
    return plan, Obstacles(reader, plan, request, access).rows()


def check_restore(job: Job) -> None:
    """Every refusal and warning, damages of the image among them, in one go."""
    job.channel.phase('verify')
    path = image_path(job)
    rows = [Refusal(0, '', 'image', 'EBADMSG', damage, 'the image cannot be used') for damage in verify(path)]
    tasks = 0
    if not rows:
        with ImageReader(path) as reader:
            job.channel.phase('plan')
            _, rows = prepare(job, reader)
            tasks = len(reader.tasks)
    job.channel.finish('refusals', [refusal_row(row) for row in rows], {'tasks': tasks})


def refused(rows: Iterable[Refusal]) -> CkptError:
    """The error for the refusals among these rows: PermissionDenied if one is EPERM, else Refused."""
    found = [row for row in rows if row.severity == 'refusal']
    first = next((row for row in found if row.errno == 'EPERM'), found[0])
    kind = PermissionDenied if first.errno == 'EPERM' else Refused
    more = f' (and {len(found) - 1} more)' if len(found) > 1 else ''
    return kind(f'{first}{more}', errno=getattr(errno, first.errno, None), task=first.pid, resource=first.resource,
                phase='plan', hint=first.hint, refusals=found)
