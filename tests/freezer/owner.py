# SPDX-License-Identifier: LGPL-2.1-or-later
"""Freezes trees and dies of it: each line of stdin is a freeze by a child that kills itself at a fault point.

    RUNTIME PID CGROUP MODE POINT       ->  "killed\\n", or "done\\n" where the freeze never came by POINT

CGROUP: of a target that is exactly this cgroup, '-' for a tree. One interpreter starts for many freezes.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ckptd.freezer import freeze
from ckptd.inspect.scan import ResolvedTarget, scan_tree
from ckptd.journal import Journal
from ckptd.kernel.ptrace import Tracee


def freeze_and_thaw(runtime: str, pid: int, cgroup: str, mode: str, at: Callable[[str], None]) -> None:
    target = ResolvedTarget((pid,), None if cgroup == '-' else cgroup, None, f'process {pid}')
    with freeze(scan_tree((pid,)), target, mode, time.monotonic() + 5, Journal(Path(runtime)),
                lambda: scan_tree((pid,)), job=1, at=at) as frozen:
        for task in frozen.tree:
            if not task.is_zombie and task.tid not in frozen.tracees:
                frozen.tracees[task.tid] = Tracee.seize(task.tid)
                frozen.tracees[task.tid].stop()
        at('seized')
        frozen.let_run()
        at('running')
        frozen.hold()
        at('held')


def main() -> None:
    for line in sys.stdin:
        runtime, pid, cgroup, mode, point = line.split()

        def at(here: str, point: str = point) -> None:
            if here == point:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            freeze_and_thaw(runtime, int(pid), cgroup, mode, at)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        answer = {0: 'done', signal.SIGKILL: 'killed'}.get(status, f'failed {status}')
        print(answer, flush=True)


if __name__ == '__main__':
    main()
