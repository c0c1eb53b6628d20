# SPDX-License-Identifier: LGPL-2.1-or-later
"""Walk the receive queues of a tree at rest, under a journal: this changes SO_PEEK_OFF and restores it.

A file in flight may have a queue of its own, with further files in flight. So each round walks the queues that the
previous round has found.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress

from ckptd.faults import fault
from ckptd.inspect.checks.files import fd_tables
from ckptd.inspect.proc_cache import ProcCache
from ckptd.journal.steps import HeldSocket, PeekOffset, WalkQueues
from ckptd.objects.files.base import OpenFile
from ckptd.tree import Tree

Found = tuple[OpenFile, HeldSocket]


def walk_queues(tree: Tree, cache: ProcCache, journal: Callable[[WalkQueues], AbstractContextManager[None]]) -> None:
    """Let the kinds of `cache` read every queue. journal(step): the block in which the offsets are changed.

    Files that may not be inspected are left out; the checks refuse them.
    """
    offsets: dict[int, PeekOffset] = {}
    holders: dict[HeldSocket, None] = {}        # of every round: a kind may change a socket of an earlier one again
    todo = list(_held_files(tree, cache))
    while todo:
        found = list(_with_queues(todo, cache, offsets))
        todo = []
        if not found:
            return
        holders.update(dict.fromkeys(holder for _, holder in found))
        with journal(WalkQueues(tuple(holders), tuple(offsets.values()))):
            fault('walking-queues')
            for file, holder in found:
                todo += [(cache.file_in_flight(fd), holder) for fd in cache.kinds.of(file).discover(file)]
            fault('walked-queues')


def _held_files(tree: Tree, cache: ProcCache) -> Iterator[Found]:
    for task in fd_tables(tree):
        with suppress(ProcessLookupError, PermissionError):
            for file in cache.files(task):
                yield file, HeldSocket(task.tgid, tree[task.tgid].start_time, file.fd)


def _with_queues(files: list[Found], cache: ProcCache, offsets: dict[int, PeekOffset]) -> Iterator[Found]:
    """Yield the files with a queue that was not walked before, and add their offsets to `offsets`."""
    for file, holder in files:
        inode = file.stat.st_ino
        if inode in offsets or not cache.kinds.may_have_queue(file):
            continue
        with suppress(ProcessLookupError, PermissionError, FileNotFoundError):
            offset = cache.kinds.of(file).peek_offset(file)
            if offset is not None:
                offsets[inode] = PeekOffset(inode, offset)
                yield file, holder
