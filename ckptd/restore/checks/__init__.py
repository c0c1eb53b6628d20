# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of everything that prevents a restart, all at once, before there is any process. Nothing is changed.

    machine     architecture, page size, xstate, vdso, features of the kernel that mappings need
    objects     open files, mapped files, directories, System V segments
    rights      restrictions of the caller, and the rights needed to set credentials at all
    attributes  limits, scheduling, credentials ... of each task
    resources   memory that needs a privilege
    imported    for an imported image, rights that its importer lacks
    capacity    memory, numbers of tasks
    surroundings    unit, cgroup, namespaces, terminal

The plan itself reports pids that are in use, and a tree that cannot be made at all.
"""

from ckptd.errors import Finding
from ckptd.image.reader import ImageReader
from ckptd.protocol.requests import RestartRequest
from ckptd.restore.checks import attributes, capacity, imported, machine, objects, resources, rights, surroundings
from ckptd.restore.checks.context import CheckContext, rows
from ckptd.restore.file_access import FileAccess
from ckptd.restore.plan import Plan

CHECKS = (machine.check, objects.check, rights.check, attributes.check, resources.check, imported.check, capacity.check,
          surroundings.check)


def obstacles(reader: ImageReader, plan: Plan, request: RestartRequest, access: FileAccess) -> list[Finding]:
    """List every refusal and warning, by check. pid: a vpid, 0 for the tree as a whole. ImageDamaged."""
    context = CheckContext(reader, plan, request, access)
    return rows(context, [row for check in CHECKS for row in check(context)])
