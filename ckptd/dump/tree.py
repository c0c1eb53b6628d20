# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stopped tree to records and page data.

    Dump(tree, tracees, cgroups, data, ...)
        .read_state()      procfs, ptrace and remote calls, process by process: records are collected in memory
        .read_memory()     pages, into the data part
    then, after the tree was let go,
        .write(writer)     the records

The order of the read matters. smaps come before the remote calls of a process, which map and unmap a few pages, and
its pages are chosen after them, so that neither shows in the image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Self

from ckptd.dump import state
from ckptd.dump.copy import Copier
from ckptd.dump.files import FileDump, Note
from ckptd.dump.memory import MemoryDump
from ckptd.dump.names import LinkNames
from ckptd.dump.remote_state import ask
from ckptd.dump.sharing import TaskSharing
from ckptd.dump.sleeps import find_sleeps, sleep_left
from ckptd.dump.waits import Wait, WaitNotes
from ckptd.errors import Finding, NotSupported, TreeChanged
from ckptd.faults import fault
from ckptd.image import records
from ckptd.image.grammar import Record
from ckptd.image.pages import DataWriter
from ckptd.image.writer import ImageWriter
from ckptd.inspect.proc_cache import ProcCache
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.stat import read_stat
from ckptd.kernel.timens import ClockReadings
from ckptd.objects.attributes import registry
from ckptd.objects.attributes.base import DumpedProcess, DumpedTask, Owners, Scope
from ckptd.objects.attributes.registry import Answers
from ckptd.objects.ipc import registry as ipc
from ckptd.objects.namespaces import registry as namespace_kinds
from ckptd.operation.timers import Timers
from ckptd.remote.borrow import OwnIds
from ckptd.remote.interleave import Steps, interleave
from ckptd.tree import Task, Tree

Report = Callable[[int, int, int, int], None]       # tasks done, of; bytes done, of

_U32 = 2**32 - 1


@dataclass(slots=True)
class _Ids:
    """Ids of the shared objects that a task uses; 0: a zombie has none."""
    mm: int = 0
    files: int = 0
    fs: int = 0
    sighand: int = 0


class Dump:
    """A dump. It does not change the tree.

    cgroups: path by tgid as it was before the freeze. notes, waits: see waits.py. save_limit: bytes of files open for
    writing that are kept. clocks: at the moment of the dump. `with` closes everything that the dump has opened. The
    stopped tasks and the data part belong to others.
    """

    def __init__(self, tree: Tree, tracees: Mapping[int, Tracee], cache: ProcCache, cgroups: Mapping[int, str],
                 notes: WaitNotes, waits: Mapping[int, Wait], data: DataWriter, report: Report, timers: Timers,
                 names: LinkNames, save_limit: int = 0, note: Note | None = None) -> None:
        self.tree, self._cache = tree, cache
        self._tracees, self._cgroups, self._report = tracees, cgroups, report
        self._data, self._notes, self.waits, self._timers = data, notes, waits, timers
        self._vtids = {task.tid: task.vtid for task in tree}
        self._groups = {task.pgid: task.vpgid for task in tree}
        self._sharing = TaskSharing()
        self._spoken_for: set[tuple[Scope, int]] = set()
        self._ids: dict[int, _Ids] = {}
        self._exit_codes: dict[int, int] = {}
        self._asked: set[int] = set()
        self._siblings: dict[int, int] = {}         # by tid of the parent: mm of the first child
        self._done = 0
        self.clocks: ClockReadings | None = None
        self._tree_records: list[Record] = []
        self._task_records: list[Record] = []
        self._dumped: list[tuple[Owners, DumpedTask, Answers]] = []
        self._memory = MemoryDump(names)
        self._files = FileDump(data, self._memory.kinds, self._groups | self._vtids, cache, names, save_limit,
                               note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.kinds.close()
        self._memory.kinds.close()

    @property
    def pages_scanned(self) -> int:
        return self._memory.pages_scanned

    @property
    def pages_written(self) -> int:
        return self._memory.pages_written

    @property
    def unsaved(self) -> list[Finding]:
        """Warnings about files that should have been saved and were not."""
        return [Finding(file.pid, self.tree[file.tid].comm, f'fd {file.fd}', errno,
                        f'{file.path} is not saved: it {why}',
                        'checkpoint with a higher --save-limit, and as a user who may read it', 'warning')
                for file, errno, why in self._files.saved.unsaved]

    # ------------------------------------------------------------ state

    def read_state(self) -> None:
        """Read everything but pages."""
        try:
            sleeps = find_sleeps(self._tracees, self._timers)
        except ProcessLookupError as error:
            raise TreeChanged('a task died while its remaining sleep was measured', phase='state') from error
        processes: dict[int, list[Task]] = {}
        for task in self.tree:
            processes.setdefault(task.tgid, []).append(task)
        interleave(self._process(threads) for threads in processes.values())
        self._files.describe()
        self.clocks = clocks = ClockReadings.read(self.tree.root.tid)
        namespaces = namespace_kinds.record(self.tree.root)
        self.own_pidns = namespaces.own_pidns
        self._tree_records += [state.header(self.tree, len(processes)), namespaces, *state.task_ids(self.tree)]
        self._task_records += [sleep_left(sleep, self._vtids[tid], clocks.host, self._notes)
                               for tid, sleep in sleeps.items()]
        self._task_records += [wait.record(self._vtids[tid], clocks.host) for tid, wait in self.waits.items()]
        self._tree_records += [self._task(task) for task in self.tree]
        self._tree_records += ipc.dump(self._cache.sysv)
        fault('state-read')

    def _process(self, threads: list[Task]) -> Steps[None]:
        alive = [task for task in threads if task.tid in self._tracees]
        try:
            self._task_records += [record for task in threads if task.is_zombie
                                   for record in registry.dump_dead(task, self._cache.status(task))]
            if alive:
                yield from self._alive(threads[0], alive)
        except ProcessLookupError as error:
            raise TreeChanged(f'{threads[0].comm}[{threads[0].tid}] died while it was read', task=threads[0].tid,
                              phase='state') from error
        self._done += len(threads)
        self._report(self._done, len(self.tree), 0, 0)

    def _task(self, task: Task) -> records.TaskRecord:
        tracee, ids = self._tracees.get(task.tid), self._ids.get(task.tid, _Ids())
        return records.TaskRecord(
            task.vtid, self._vtids.get(task.parent_tid, 0), task.comm, self._state(task, tracee),
            self._exit_codes.get(task.tid, task.exit_code) & _U32,
            task.exit_signal & _U32, tracee.stop_signal if tracee else 0, task.flags, ids.mm, ids.files, ids.fs,
            ids.sighand, self._cgroups.get(task.tgid, ''))

    @staticmethod
    def _state(task: Task, tracee: Tracee | None) -> int:
        """Return the state of a task as it was found. A task that the ptrace freezer has stopped was sleeping or
        running."""
        if task.state != 't' or tracee is None:
            return ord(task.state)
        return ord('T' if tracee.stop_signal else 'S')

    def _alive(self, leader: Task, alive: list[Task]) -> Steps[None]:
        """Read a process that has a living thread to ask. A leader that has exited cannot be asked."""
        anchor = alive[0]
        for task in alive:
            self._check_registers(task)
        mappings = self._cache.mappings(anchor)
        statuses = {task.tid: self._cache.status(task) for task in alive}
        self._share(alive)
        mine, stat = self._ids[anchor.tid], read_stat(anchor.tid)
        if self._tracees[anchor.tid].stop_signal:
            self._exit_codes[anchor.tid] = stat.exit_code      # the value of a thread is not shown (fs/proc/array.c)
        threads = [(self._tracees[task.tid], OwnIds(task.vtgid, task.vtid)) for task in alive]
        while mine.mm in self._asked:       # processes that share one address space also share the place of the code
            yield
        self._asked.add(mine.mm)
        try:
            # before the task is asked, because its trap may replace a pending signal
            pending = {task.tid: self._tracees[task.tid].pending(shared=False) for task in alive}
            shared = self._tracees[anchor.tid].pending(shared=True)
            answers = yield from ask(threads, mappings, statuses[anchor.tid].sig_cgt)
        finally:
            self._asked.remove(mine.mm)
        process = DumpedProcess(leader, stat, shared, self._vtids, self._groups)
        for task in alive:
            of = DumpedTask(task, statuses[task.tid], pending[task.tid], process)
            owners = self._owners(task, leader if task is anchor else None)
            answers.threads[task.tid].look(owners, task, self._tracees[task.tid])
            self._dumped.append((owners, of, answers.threads[task.tid]))
        self._memory.add(mine.mm, anchor.tid, mappings, stat, answers, self._origin(leader, mine.mm))
        for task in alive:
            self._cache.forget(task)

    def _origin(self, leader: Task, mm: int) -> int:
        """Return the address space that a process may have been forked from and that was copied before: its parent's
        or, if that is not part of the tree, a sibling's."""
        parent = self._ids.get(leader.parent_tid, _Ids()).mm
        sibling = self._siblings.setdefault(leader.parent_tid, mm)
        return next((one for one in (parent, sibling) if 0 < one < mm), 0)

    def _check_registers(self, task: Task) -> None:
        """Check the registers. The code segment is the only certain sign of 32-bit code: the check before the freeze
        sees the program only.

        With Syscall User Dispatch (Wine, emulators) a remote call would cause a SIGSYS. As that is forced while it is
        blocked, the kernel would reset its handler to the default (kernel/signal.c, force_sig_info_to_task).
        """
        if self._tracees[task.tid].user_dispatch().mode:
            raise NotSupported(f'{task.comm}[{task.tid}] uses Syscall User Dispatch', task=task.tid,
                               resource='registers', phase='state',
                               hint='a program under Syscall User Dispatch (prctl(2)) cannot be checkpointed yet')
        if self._tracees[task.tid].regs.cs != arch.CS_64:
            raise NotSupported(f'{task.comm}[{task.tid}] runs 32-bit code', task=task.tid, resource='registers',
                               phase='state', hint='only 64-bit tasks can be checkpointed')

    def _share(self, alive: list[Task]) -> None:
        """Assign the ids of the objects that each thread uses. The first user of an fd table reads it."""
        anchor = alive[0].tid
        mm, _ = self._sharing.mm.id_of(anchor)
        sighand, _ = self._sharing.sighand.id_of(anchor)
        for task in alive:
            files, new_files = self._sharing.files.id_of(task.tid)
            if new_files:
                self._files.enter(files, self._cache.files(task))
            fs, _ = self._sharing.fs.id_of(task.tid)
            self._ids[task.tid] = _Ids(mm, files, fs, sighand)

    def _owners(self, task: Task, leader: Task | None) -> dict[Scope, int]:
        """Return the objects that a thread answers for, by id: itself, its process if that has the leader given, and
        shared objects that no other thread has answered for."""
        ids, owners = self._ids[task.tid], {Scope.THREAD: task.vtid}
        shared = {Scope.FS: ids.fs}
        if leader:
            owners[Scope.PROCESS] = leader.vtid
            shared |= {Scope.MM: ids.mm, Scope.SIGHAND: ids.sighand}
        for scope, number in shared.items():
            if (scope, number) not in self._spoken_for:
                self._spoken_for.add((scope, number))
                owners[scope] = number
        return owners

    # ------------------------------------------------------------ memory

    def read_memory(self) -> None:
        """Copy the chosen pages of all address spaces and the content of shared objects into the data part."""
        total, done, tasks = self._memory.scan(), 0, len(self.tree)

        def on_bytes(count: int) -> None:
            nonlocal done
            if done < total // 2 <= done + count:
                fault('memory-half')
            done += count
            self._report(tasks, tasks, min(done, total), total)

        with Copier(self._data, on_bytes) as copier:
            self._memory.copy(copier)
        fault('memory-read')

    @property
    def must_take_out(self) -> bool:
        """Whether `take_out` may have something to do."""
        return self._files.must_take_out

    @property
    def left_outside(self) -> int:
        """Number of records with something that lasts outside of the image until a restart."""
        return self._files.left_outside

    def take_out(self) -> None:
        """Take out of the kernel what cannot be read otherwise, last of all, from a tree that is killed then."""
        self._files.take_out()
        fault('taken-out')

    # ------------------------------------------------------------ after the tree was released

    def die(self) -> None:
        """Prepare the open files for the end of the tree."""
        self._files.die()

    def write(self, writer: ImageWriter) -> None:
        """Write all records. SpoolFailed."""
        attributes = (record for dumped in self._dumped for record in registry.dump(*dumped))
        parts = {'TREE': self._tree_records, 'TASK': chain(self._task_records, attributes),
                 'FILE': self._files.records(), 'MEM ': self._memory.records()}
        for code, rows in parts.items():
            part = writer.part(code)
            for row in rows:
                part.write(row)
