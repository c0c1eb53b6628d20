# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the plan first, with everything that prevents it. A dry run ends here."""

from collections.abc import Iterable
from dataclasses import replace

from ckptd.errors import CkptError, Finding, ImageDamaged, Refused, errno_name
from ckptd.image.reader import ImageReader
from ckptd.image.verify import Records, verify
from ckptd.objects.files.base import InheritedFiles
from ckptd.objects.namespaces.birth import decide
from ckptd.operation.context import JobContext
from ckptd.protocol.messages import finding_row
from ckptd.protocol.requests import CheckRestoreRequest, RestartRequest
from ckptd.restore.checks import obstacles
from ckptd.restore.file_access import FileAccess
from ckptd.restore.plan import Plan, make_plan, read_numbers


def prepare(job: JobContext[RestartRequest], reader: ImageReader) -> tuple[Plan, list[Finding]]:
    """Return the plan, with every refusal and warning about it; pids are vpids. ImageDamaged. Nothing is changed."""
    request = job.request
    namespaces = decide(reader, new_pidns=request.new_pidns, brokered=request.brokered)
    plan = make_plan(reader, namespaces, read_numbers(reader, namespaces, request.caller),
                     own_session=job.fd >= 0,
                     child_of_us=request.wait)
    access = FileAccess(reader, request.caller, request.changed_files, job.fd, inherited_files(job),
                        detach_terminal=request.detach_terminal)
    names = {task.vpid: task.record.comm for task in reader.tasks}
    rows = [replace(row, comm=row.comm or names.get(row.pid, '')) for row in plan.refusals]
    return plan, list(dict.fromkeys([*rows, *obstacles(reader, plan, request, access)]))


def inherited_files(job: JobContext[RestartRequest]) -> InheritedFiles:
    """Return what the caller gives for connections to the outside."""
    return InheritedFiles(zip(job.request.inherit, job.inherited, strict=True))


def refused(rows: Iterable[Finding]) -> CkptError:
    """Return the error for the refusals among these rows."""
    return Refused.restart([row for row in rows if row.severity == 'refusal'], 'plan')


def check_restore(job: JobContext[CheckRestoreRequest]) -> None:
    """List every reason why a restore would be refused, and warnings of what it would lose, including damages of the
    image."""
    job.channel.phase('verify')
    tasks = 0
    records: Records = {}
    with job.image_files() as files:
        rows = [damage(sentence) for sentence in verify(files, records=records)]
        if not rows:
            job.channel.phase('plan')
            try:
                with ImageReader(files, records=records) as reader:
                    plan, rows = prepare(job, reader)
                    tasks = len(plan.tasks)
            except ImageDamaged as error:
                rows = [damage(error.message, error)]
    job.channel.finish('refusals', [finding_row(row) for row in rows], {'tasks': tasks})


def damage(sentence: str, error: ImageDamaged | None = None) -> Finding:
    """Convert a damage of the image to a row."""
    error = error or ImageDamaged(sentence)
    return Finding(0, '', error.resource or 'image', errno_name(error.errno), sentence, error.hint)
