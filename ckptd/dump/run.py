# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operation checkpoint: the order of a dump. A failure leaves nothing behind.

    resolve, scan       roots, tree, all refusals; the spool accepts an image
    freeze, rescan      everything at rest, checked again
    seize, state, memory
    release             after=resume: the tree runs on from here, and only then is the image brought to the disk
    write, publish
    release             after=kill and after=freeze: only once the image is safe
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack

from ckptd import __version__
from ckptd.dump.deaths import Deaths
from ckptd.dump.end import TreeEnd
from ckptd.dump.files import Note
from ckptd.dump.names import LinkNames
from ckptd.dump.queues import walk_queues
from ckptd.dump.resume import issue_again, wait_on
from ckptd.dump.seize import seize_all
from ckptd.dump.tree import Dump
from ckptd.dump.waits import WaitNotes, note_waits
from ckptd.errors import CkptError, Finding, TreeChanged
from ckptd.faults import fault
from ckptd.freezer import FrozenTree
from ckptd.freezer.groups import read_cgroups
from ckptd.image import manifest as manifests
from ckptd.image.manifest import Manifest, Statistics
from ckptd.image.writer import ImageWriter
from ckptd.inspect.proc_cache import ProcCache
from ckptd.inspect.scan import Handles
from ckptd.kernel.creds import CAP_SYS_PTRACE, give_up_capability
from ckptd.kernel.task import boot_id
from ckptd.kernel.timens import ClockReadings
from ckptd.kernel.yama import CAPABLE, ptrace_scope
from ckptd.objects.attributes.registry import lend
from ckptd.operation.clock import Clock
from ckptd.operation.context import JobContext
from ckptd.operation.deadline import Patience
from ckptd.operation.watchdog import StopLimit
from ckptd.protocol.messages import Frozen, first_rows
from ckptd.protocol.requests import CheckpointRequest
from ckptd.tree import Tree


def checkpoint(job: JobContext[CheckpointRequest]) -> None:
    """Dump the tree, publish the image, leave the tree as `request.after` says, and report to the daemon."""
    Checkpoint(job).run()


class Checkpoint:
    """A checkpoint, phase by phase."""

    def __init__(self, job: JobContext[CheckpointRequest]) -> None:
        self._job, self._request, self._channel = job, job.request, job.channel
        self._clock = Clock()
        self._warnings: list[Finding] = []

    def run(self) -> None:
        self._channel.phase('resolve')
        target = self._job.resolve()
        fault('resolved')
        self._channel.phase('scan')
        tree = self._job.require_running(target.roots)
        cgroups = read_cgroups(tree)      # before the freeze, which may move it
        fault('scanned')
        # the spool is tried before anything is frozen: if it is full or read-only, the tree never stops
        with ImageWriter(self._job.destination(), self._request.keep_free) as writer, ExitStack() as stack:
            self._names = stack.enter_context(self._job.names())
            self._links = LinkNames(self._names)
            self._channel.phase('freeze')
            notes = note_waits(tree)
            limit = StopLimit(self._request)
            with self._clock.measure('freezing'):
                frozen = stack.enter_context(self._job.frozen(target, tree, remote_calls=True))
            with self._clock.measure('frozen'):
                note = stack.enter_context(self._job.taking()) if self._request.after == 'kill' else None
                deaths = stack.enter_context(Deaths(frozen.tree))
                dump = stack.enter_context(self._dump(frozen, cgroups, notes, writer, deaths, note, limit))
                if self._request.after == 'resume':
                    wait_on(frozen.tracees, dump.waits)
                    self._release(frozen)
            manifest = self._publish(writer, dump, frozen)
            self._finish(frozen, manifest, dump, deaths.handles)

    def _dump(self, frozen: FrozenTree, cgroups: Mapping[int, str], notes: WaitNotes, writer: ImageWriter,
              deaths: Deaths, note: Note | None, limit: StopLimit) -> Dump:
        """Do everything that needs the tree to be at rest."""
        fault('frozen')
        self._channel.phase('rescan')
        cache = self._job.cache(at_rest=True)
        walk_queues(frozen.tree, cache, self._job.walking)
        tree = self._rescan(frozen, cache)
        self._channel.phase('seize')
        deadline = time.monotonic() + self._request.timeout_usec / 1e6
        patience = Patience(self._request.timeout_usec / 1e6, self._channel.check)
        with deaths.explaining(frozen.tracees), ExitStack() as undo:
            seize_all(tree, frozen.tracees, deadline, patience,
                      lambda count: self._channel.progress(count, len(tree), 0, 0))
            self._give_up_tracing(is_read=False)
            for tid, tracee in frozen.tracees.items():
                lend(cache.status(tree[tid]), tracee)
            waits = issue_again(frozen.tracees, notes)
            # stopped by ptrace, the tasks stay stopped without the freezer, and only so can they make remote calls
            frozen.let_run()
            self._channel.phase('state')

            def report(tasks_done: int, tasks: int, bytes_done: int, size: int) -> None:
                deaths.check()
                limit.check()
                self._channel.progress(tasks_done, tasks, bytes_done, size)

            dump = undo.enter_context(Dump(tree, frozen.tracees, cache, cgroups, notes, waits, writer.data, report,
                                           self._job.timers(), self._links,
                                           self._request.save_limit if self._request.save_files else 0, note))
            dump.read_state()
            self._warnings += dump.unsaved
            self._channel.phase('memory')
            with self._clock.measure('memdump'):
                dump.read_memory()
                if note is not None and dump.must_take_out:
                    # if the worker dies in the middle, the tree does not run before the journal has put things back
                    frozen.hold()
                    dump.take_out()
            self._give_up_tracing(is_read=True)
            deaths.require_none(frozen.tracees)
            undo.pop_all()
        return dump

    def _give_up_tracing(self, *, is_read: bool) -> None:
        """Give up CAP_SYS_PTRACE, which was lent to trace the tree. is_read: the memory of the tree has been read."""
        # with ptrace_scope 2, Yama lets not even the tracer read a task without that capability
        lent = self._request.brokered and self._request.trace_under_yama
        if lent and (is_read or ptrace_scope() != CAPABLE):
            give_up_capability(CAP_SYS_PTRACE)

    def _rescan(self, frozen: FrozenTree, cache: ProcCache) -> Tree:
        """Scan the tree again, now that it is at rest: it must have the same tasks, and every check is repeated.

        The freezer's last scan is no proof by itself. A task that it did not know may have exited meanwhile, and left
        its children to a parent whose children had been read.
        """
        tree = frozen.rescan()
        changes = frozen.tree.changes(tree)
        if changes:
            raise TreeChanged(f'the tree changed while it was frozen: {changes[0]}', phase='rescan')
        self._warnings = self._job.require(tree, cache)
        fault('rescanned')
        return tree

    def _release(self, frozen: FrozenTree) -> None:
        self._channel.phase('release')
        frozen.restore()
        fault('restored')
        frozen.close()
        fault('released')

    def _publish(self, writer: ImageWriter, dump: Dump, frozen: FrozenTree) -> Manifest:
        self._channel.phase('write')
        with self._clock.measure('memwrite'):
            dump.write(writer)
            fault('written')
            self._seal(writer, len(dump.tree))
        fault('sealed')
        self._channel.phase('publish')
        manifest = writer.publish(self._manifest(dump, frozen))
        fault('name-kept')
        self._names.keep()
        fault('published')
        return manifest

    def _seal(self, writer: ImageWriter, tasks: int) -> None:
        """Compute digests and write to the disk: the longest part of a large image, which can be cancelled like any
        other."""
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            self._channel.progress(tasks, tasks, min(done, writer.size), writer.size)

        writer.seal(on_bytes)

    def _manifest(self, dump: Dump, frozen: FrozenTree) -> Manifest:
        request, tree = self._request, dump.tree
        statistics = Statistics(
            freezing_time=self._clock.usec('freezing'), frozen_time=self._clock.usec('frozen'),
            memdump_time=self._clock.usec('memdump'), memwrite_time=self._clock.usec('memwrite'),
            total_time=self._clock.total_usec(), pages_scanned=dump.pages_scanned, pages_written=dump.pages_written)
        return Manifest(
            image=request.image, created_usec=time.time_ns() // 1000, ckptd_version=__version__,
            kernel=os.uname().release, boot_id=boot_id(), owner_uid=request.caller.uid, owner_gid=request.caller.gid,
            target=request.about, root=tree.root.vtid, command=tree.root.comm, tasks=len(tree),
            processes=len(tree.leaders), freeze_mode=frozen.mode, statistics=statistics, clocks=_clocks(dump.clocks),
            warnings=tuple(self._warnings),
            own_pidns=dump.own_pidns, names=len(self._links) + dump.left_outside)

    def _finish(self, frozen: FrozenTree, manifest: Manifest, dump: Dump, handles: Handles) -> None:
        after = self._request.after
        if after == 'kill':
            self._channel.phase('release')
            TreeEnd(frozen, handles, dump.die).run(self._stop_unit if self._request.stop_unit else None)
        elif after == 'freeze':
            self._channel.phase('release')
            hold(frozen)
            self._channel.send(Frozen(len(frozen.tree), frozen.mode))
        self._channel.finish('', (), summary(manifest))
        if after == 'freeze':
            self._channel.wait_thaw()

    def _stop_unit(self) -> None:
        """Have the unit that is the tree stopped. CkptError if its manager refuses."""
        try:
            self._job.stop_unit()
        except CkptError as error:
            error.hint = '. '.join(filter(None, (f'the tree runs on; image {self._request.image} is complete',
                                                 error.hint)))
            raise


def _clocks(clocks: ClockReadings | None) -> manifests.Clocks:
    if clocks is None:
        return manifests.Clocks()
    return manifests.Clocks(monotonic=clocks.monotonic, boottime=clocks.boottime,
                            monotonic_offset=clocks.monotonic_offset, boottime_offset=clocks.boottime_offset)


def summary(manifest: Manifest) -> dict[str, object]:
    """Make the result of a finished checkpoint: counts, bytes, microseconds, and warnings about the image."""
    numbers = {name: getattr(manifest.statistics, name) for name in Statistics.__struct_fields__}
    return {'image': manifest.image, 'target': manifest.target, 'command': manifest.command, 'tasks': manifest.tasks,
            'processes': manifest.processes, 'size': manifest.size, 'freeze_mode': manifest.freeze_mode,
            'warnings': first_rows(manifest.warnings), **numbers}


def hold(frozen: FrozenTree) -> None:
    """Leave the tree frozen. If a cgroup holds it, detach from the tracees, because a debugger may want them."""
    frozen.hold()
    if frozen.mode != 'ptrace':
        frozen.let_go()
