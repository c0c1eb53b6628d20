# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attributes of tasks that cannot be restored as they were. Each file of objects/attributes gives the reasons."""

from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.objects.attributes.registry import Kept
from ckptd.restore.attributes import owners_of
from ckptd.restore.checks.context import CheckContext, once


def check(context: CheckContext) -> Iterator[Finding]:
    kept, owners = Kept(context.reader), owners_of(context.plan)
    yield from kept.unknown()
    for process in context.plan.processes:
        yield from once(row for task in process.alive for row in kept.obstacles(owners[task.vpid], task, context))
