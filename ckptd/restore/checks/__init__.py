# SPDX-License-Identifier: LGPL-2.1-or-later
"""What stands in the way of a restart: all of it at once, before there is any process, and nothing is changed.

    machine     architecture, page size, xstate, vdso, features of the kernel
    objects     open files, mapped files, directories, System V segments
    rights      what the caller has given up, and what it takes to set credentials at all
    attributes  limits, scheduling, credentials ... of each task
    resources   memory that takes a privilege
    imported    of an image from outside, what its importer has not
    room        memory, numbers of tasks
    surroundings    cgroup, namespaces, terminal

That numbers are taken, and that a tree cannot be made at all, is said by the plan itself.
"""

from ckptd.errors import Finding
from ckptd.image.reader import ImageReader
from ckptd.protocol.messages import JobRequest
from ckptd.restore.checks import attributes, capacity, imported, machine, objects, resources, rights, surroundings
from ckptd.restore.checks.context import CheckContext, rows
from ckptd.restore.file_access import FileAccess
from ckptd.restore.plan import Plan

CHECKS = (machine.check, objects.check, rights.check, attributes.check, resources.check, imported.check, capacity.check,
          surroundings.check)


def obstacles(reader: ImageReader, plan: Plan, request: JobRequest, access: FileAccess) -> list[Finding]:
    """Every refusal and warning, by check. pid: as a vpid, 0 for the tree as a whole. ImageDamaged."""
    context = CheckContext(reader, plan, request, access)
    return rows(context, [row for check in CHECKS for row in check(context)])
