# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deaths in a stopped tree: SIGKILL reaches a task that is frozen and traced, and half of it must not become an image.

The proc connector tells of an exit as it happens, where the kernel has one for us; the pidfds, asked at the end, are
the truth everywhere.
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
    """Watches the tasks of a tree at rest. `handles` has their pidfds."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._alive = {task.tid: task for task in tree if not task.is_zombie}
        with ExitStack() as stack:
            # the watch first: who dies after its pidfd was opened is told of
            self._watch = stack.enter_context(ForkWatch())
            self.handles = stack.enter_context(Handles(tree))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """TreeChanged if an exit has been told of. Costs one recvfrom(2)."""
        for event in self._watch.read():
            if event.kind == 'exit' and event.tid in self._alive:
                raise self._died(self._alive[event.tid])

    def require_none(self, tracees: Mapping[int, Tracee]) -> None:
        """TreeChanged if any task has died since the scan, told of or not."""
        for task in self.handles.dead(self._tree):
            raise self._died(task)
        # one that was killed may take long to let go of its memory, and counts as alive until then; but it is not
        # stopped any more, and its memory looks empty
        for tid, tracee in tracees.items():
            if tracee.stopped and not tracee.is_stopped():
                raise self._died(self._tree[tid])

    @contextmanager
    def told(self, tracees: Mapping[int, Tracee]) -> Iterator[None]:
        """Whatever fails in the block for the death of a task becomes TreeChanged."""
        try:
            yield
        except (Cancelled, TreeChanged):
            raise
        except Exception:
            # what cannot be read, or looks odd, may be a task that was killed
            self.require_none(tracees)
            raise

    def _died(self, task: Task) -> TreeChanged:
        return TreeChanged(f'{task.comm}[{task.tid}] died while it was dumped', task=task.tid, resource='task')
