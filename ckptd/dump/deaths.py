# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deaths in a stopped tree. SIGKILL reaches a task that is frozen and traced, and an incomplete tree must not become an
image.

Where the kernel has a proc connector for us, it reports an exit as it happens. The pidfds, checked at the end, are the
truth everywhere.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Self

from ckptd.errors import Cancelled, TreeChanged
from ckptd.inspect.scan import Handles
from ckptd.kernel.netlink import ForkWatch
from ckptd.kernel.ptrace import Tracee
from ckptd.tree import Task, Tree


class Deaths:
    """A watch of the tasks of a tree at rest. `handles` has their pidfds."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._alive = {task.tid: task for task in tree if not task.is_zombie}
        with ExitStack() as stack:
            # the watch comes first, so that a death after its pidfd was opened is reported
            self._watch = stack.enter_context(ForkWatch())
            self.handles = stack.enter_context(Handles(tree))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Raise TreeChanged if an exit has been reported. It costs one recvfrom(2)."""
        for event in self._watch.read():
            if event.kind == 'exit' and event.tid in self._alive:
                raise self._died(self._alive[event.tid])

    def require_none(self, tracees: Mapping[int, Tracee]) -> None:
        """Raise TreeChanged if any task has died since the scan, reported or not."""
        for task in self.handles.dead(self._tree):
            raise self._died(task)
        # A killed task may take long to release its memory and counts as alive until then. But it is no longer stopped,
        # and its memory looks empty.
        for tid, tracee in tracees.items():
            if tracee.stopped and not tracee.is_stopped():
                raise self._died(self._tree[tid])

    @contextmanager
    def explaining(self, tracees: Mapping[int, Tracee]) -> Iterator[None]:
        """Turn any failure in the block that was caused by the death of a task into TreeChanged."""
        try:
            yield
        except (Cancelled, TreeChanged):
            raise
        except Exception:
            # an unreadable or odd value may come from a task that was killed
            self.require_none(tracees)
            raise

    def _died(self, task: Task) -> TreeChanged:
        return TreeChanged(f'{task.comm}[{task.tid}] died while it was dumped', task=task.tid, resource='task')
