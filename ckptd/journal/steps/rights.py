# SPDX-License-Identifier: LGPL-2.1-or-later
"""Undo a step with the rights of the user who took it."""

import os
from collections.abc import Callable

from ckptd.kernel.creds import UserIds, become
from ckptd.kernel.fork import run_in_child


def as_maker(step: UserIds, work: Callable[[], None]) -> None:
    """Do the work with the rights with which the step was taken. Root does it in a child that becomes that user and has
    no capability. An OSError of the child is raised here."""
    if step.uid == os.geteuid():
        work()
        return

    def as_user() -> None:
        become(step.uid, step.gid, step.groups, 0)
        work()

    run_in_child(as_user)
