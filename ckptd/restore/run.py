# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operation restore, phase by phase. A failure before the start leaves nothing.

    verify      the image is complete
    plan        everything that prevents the restart, at once; nothing has been changed
    open        files, shared memory, terminals, as service fds
    create      stubs with the right pids, parents, sessions, groups
    fill        address spaces and their pages
    rebuild     open files, state, rights
    start       cgroups and registers; all run
    attend      with `wait`: until the root has ended
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ckptd.errors import Finding
from ckptd.faults import fault
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.image.records import Fs, ProcessState
from ckptd.image.verify import Records, verify_records
from ckptd.kernel.prctl import PR_SET_NAME
from ckptd.kernel.ptrace import let_go
from ckptd.objects.attributes.allowed import Allowed
from ckptd.objects.attributes.base import Stage
from ckptd.objects.files.deleted import open_directory
from ckptd.objects.ipc.registry import make_all
from ckptd.objects.namespaces.birth import make_reaper
from ckptd.objects.namespaces.registry import enter
from ckptd.operation.clock import Clock
from ckptd.operation.context import JobContext
from ckptd.operation.deadline import stub_patience
from ckptd.protocol.messages import Phase, TreeRuns, first_rows
from ckptd.protocol.requests import RestoreRequest
from ckptd.remote.interleave import Steps, finish, interleave
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub
from ckptd.restore.attributes import TaskAttributes
from ckptd.restore.bootstrap import start_bootstrap
from ckptd.restore.cgroups import cgroups, place_for
from ckptd.restore.create import TaskBuilder
from ckptd.restore.creation_order import SEED, NewProcess
from ckptd.restore.creation_steps import Clear, CreateTask, Fill, NewSession, Step
from ckptd.restore.digests import Digests, damaged
from ckptd.restore.files import FileBuilder
from ckptd.restore.leave import Leave
from ckptd.restore.linked_names import take_names_away
from ckptd.restore.memory import Space, clear
from ckptd.restore.plan import DEAD, Plan
from ckptd.restore.prepare import inherited_files, prepare, refused
from ckptd.restore.service_fds import ServiceFds
from ckptd.restore.shed import Shed
from ckptd.restore.supervise import attend, cgroup_of

_NO_LIMIT = (1 << 32) - 1
TIMED = ('verify', 'plan', 'open', 'create', 'fill', 'rebuild', 'start')     # phases, microseconds in the result


class Restore:
    """A restart."""

    def __init__(self, job: JobContext[RestoreRequest], reader: ImageReader, plan: Plan, warnings: Sequence[Finding],
                 clock: Clock) -> None:
        self._job, self._channel, self._request = job, job.channel, job.request
        self._reader, self._plan, self._clock = reader, plan, clock
        self._mms, self._tables = plan.users('mm_id'), plan.users('files_id')
        self._fss = plan.users('fs_id')
        self._warnings = list(warnings)
        self._allowed = Allowed(reader, job.request.hard_limits)
        self._bytes_done = self._bytes_total = 0

    def run(self, digests: Digests) -> None:
        with ExitStack() as stack:
            with self._phase('open'):
                self._open(stack)
            fault('opened')
            with self._phase('create'):
                self._create(stack)
            fault('created')
            with self._phase('fill'):
                self._fill()
            fault('filled')
            with self._phase('rebuild'):
                self._rebuild()
                digests.require()
            fault('rebuilt')
            with self._phase('start'):
                self._objects.finish()
                Leave(self._reader, self._plan, self._builder, self._attributes,
                      all_stopped=self._request.leave_stopped, check=self._channel.check).run()
                self._start()
        self._attend()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._channel.phase(name)
        with self._clock.measure(name):
            yield

    # ------------------------------------------------------------ open, create

    def _open(self, stack: ExitStack) -> None:
        """Open files before any task exists, so that all tasks inherit them."""
        reader, request = self._reader, self._request
        self._service_fds = stack.enter_context(ServiceFds(self._plan.highest))
        self._place = stack.enter_context(place_for(self._job))
        self._place.want(cgroups(self._plan.processes))
        self._place.prepare()
        self._files = FileBuilder(reader, self._service_fds, request.caller, request.changed_files, self._job.fd,
                                  inherited_files(self._job), self._place, request.keep_free,
                                  detach_terminal=request.detach_terminal)
        stack.callback(self._files.kinds.close)
        self._objects = self._files.objects
        self._files.open_all(late=False)
        make_all(reader, self._place.note)
        self._spaces = {mm_id: Space(reader, mm_id, self._plan.origins.get(mm_id, 0), self._objects, self._data,
                                     self._locked(mm_id), self._on_bytes) for mm_id in self._mms}
        for space in self._spaces.values():
            space.open()
            self._bytes_total += space.bytes_to_read
        for fs_id in self._fss:
            record = reader.get(Fs, fs_id)
            self._directory(record.cwd)
            self._directory(record.root)
        self._directory('/')
        self._give_terminal()

    def _data(self, part: int) -> int:
        return self._service_fds.once(('data', part), lambda: os.dup(self._reader.data_fd(part)))

    def _locked(self, mm_id: int) -> frozenset[int]:
        owner = next(process.vpid for process in self._plan.processes if process.ids.mm_id == mm_id and process.alive)
        return self._allowed.locked(owner, self._reader.memory(mm_id).vmas)

    def _directory(self, path: str) -> int:
        return self._service_fds.once(('directory', path),
                                      lambda: open_directory(path, self._files))

    def _create(self, stack: ExitStack) -> None:
        cgroup = self._place.cgroup_fd
        if cgroup >= 0:
            cgroup = self._service_fds.once('cgroup', lambda: os.dup(cgroup))
        self._builder = TaskBuilder(start_bootstrap(self._plan.arena, self._service_fds.base,
                                                    stub_patience(self._channel.check)),
                                    cgroup)
        stack.enter_context(self._builder)
        self._attributes = TaskAttributes(self._reader, self._plan, self._builder, self._allowed, self._directory,
                                          self._terminal, self._warnings.append)
        namespaces, numbers = self._plan.namespaces, self._plan.numbers
        self._warnings += enter(namespaces, self._builder[SEED])
        if namespaces.pid:
            self._builder.new_namespace(own_init=1 in numbers, child_of_us=self._request.wait,
                                        is_bootstrap=namespaces.bootstrap_is_init)
        for step in self._plan.steps:
            self._take(step)
            fault('created-one')
            # a Cancel takes effect between any two of them
            self._channel.progress(len(self._builder.stubs), len(self._plan.tasks), 0, self._bytes_total)
        self._builder.end_bootstrap()

    def _take(self, step: Step) -> None:
        match step:
            case Fill(mm_id, vpid):
                finish(self._spaces[mm_id].build(self._builder[vpid]))
            case Clear(vpid):
                script = Script(self._builder[vpid])
                clear(script, self._builder[vpid])
                script.do()
            case CreateTask(vpid):
                self._builder.take(step)
                self._attributes.born(vpid)
            case NewSession(vpid):
                self._builder.take(step)
                self._attributes.begins_session(vpid)
            case _:
                self._builder.take(step)

    def _fill(self) -> None:
        """Fill the address spaces that no other one inherits. All tasks exist by then."""
        spaces = [(self._builder[self._mms[mm_id]], space) for mm_id, space in self._spaces.items()]
        interleave(space.build(stub) for stub, space in spaces if not space.is_built)
        interleave(space.finish(stub) for stub, space in spaces)

    # ------------------------------------------------------------ rebuild

    def _rebuild(self) -> None:
        builder, plan = self._builder, self._plan
        holders = {files_id: [vpid] for files_id, vpid in self._tables.items()}
        self._files.attach(dict(builder), holders)
        self._files.open_all(late=True)
        interleave(self._files.install(builder[vpid], files_id) for files_id, vpid in self._tables.items())
        interleave(self._process(process) for process in plan.processes if process.alive)
        # A process that closes any fd of a file loses all its locks on it, so locks come after the service fds are
        # closed.
        interleave(self._close_service_fds(builder[vpid]) for vpid in self._tables.values())
        Shed(self._reader, plan, builder, self._attributes, self._spaces).run()
        fault('shed')
        self._files.finish()
        self._objects.seal()
        for task in plan.tasks:
            if task.record.state in DEAD:
                self._become_zombies(task)

    def _process(self, process: NewProcess) -> Steps[None]:
        """Set up all threads of a process: everything that may need a right, or none."""
        for task in process.alive:
            script = Script(self._builder[task.vpid])
            if self._mms[task.record.mm_id] == task.vpid:
                self._spaces[task.record.mm_id].describe(script)
            yield from self._attributes.set(Stage.ATTRIBUTES, task, script)
            yield from script.run()
        for task in process.alive:
            script = Script(self._builder[task.vpid])
            yield from self._attributes.set(Stage.LIMITS, task, script)
            yield from script.run()

    def _close_service_fds(self, stub: Stub) -> Steps[None]:
        script = Script(stub)
        script.call('close_range', self._service_fds.base, _NO_LIMIT, 0)
        return script.run()

    def _terminal(self, session: int) -> int:
        """Return the terminal of a session. Kinds of files have added those that are in the tree."""
        return self._service_fds.find(('terminal', session))

    def _give_terminal(self) -> None:
        """Give the caller's terminal to the first session that has none of the tree."""
        if self._files.terminal and not self._request.detach_terminal:
            for process in self._plan.processes:
                if (process.alive and process.sid == process.vpid and self._terminal(process.vpid) < 0
                        and self._reader.get(ProcessState, process.vpid).tty):
                    self._service_fds.once(('terminal', process.vpid), lambda: os.dup(self._job.fd))
                    return

    def _become_zombies(self, task: ImageTask) -> None:
        """Turn the stub of a dead task into a zombie."""
        stub = self._builder[task.vpid]
        script = Script(stub)
        script.call('prctl', PR_SET_NAME, task.record.comm.encode('utf-8', 'surrogateescape')[:15] + b'\0')
        script.do()
        process = next(one for one in self._plan.processes if one.vpid == task.vtgid)
        if process.alive:
            stub.exit_thread(task.record.exit_code)
        else:
            stub.die(task.record.exit_code)
            del self._builder.stubs[task.vpid]

    # ------------------------------------------------------------ start

    def _start(self) -> None:
        """Release all tasks. Steps that cannot fail come last, and steps that cannot be undone before them."""
        self._place.settle({process.vpid: self._builder[process.alive[0].vpid].tid for process in self._plan.processes
                            if process.alive})
        fault('ready')
        self._builder.require_stopped()
        self._files.commit()
        # the last step: without its names the image cannot be restored again
        if self._reader.manifest.names:
            take_names_away(self._reader, self._files)
        init = self._builder.init
        if init:
            make_reaper(init, self._plan.processes[0].vpid, self._directory('/'))
        self._files.arm()
        let_go(stub.tracee for _, stub in self._builder)
        if init:
            init.tracee.detach()        # last: if it dies now, it takes the whole namespace along
        self._builder.released = True
        fault('started')
        self._place.lift_barrier()

    def _attend(self) -> None:
        """Wait for the end of the running tree. Close everything that we hold of it, or its pipes and terminals would
        never reach end-of-file."""
        roots = [self._builder[process.vpid].tid for process in self._plan.processes if not process.parent]
        init = self._builder.init
        with open(os.devnull, 'rb') as nothing:  # noqa: PTH123
            for fd in {self._job.fd, *self._job.inherited} - {-1}:
                os.dup2(nothing.fileno(), fd, inheritable=False)
        warnings = first_rows((*self._warnings, *self._place.warnings))
        times = {f'{phase}_time': self._clock.usec(phase) for phase in TIMED}
        result = {'image': self._request.image, 'root': roots[0], 'tasks': len(self._plan.tasks),
                  'processes': len(self._plan.processes), 'bytes': self._bytes_done, 'cgroup': cgroup_of(roots[0]),
                  'warnings': warnings, 'restored_usec': self._clock.total_usec(), **times}
        if self._plan.namespaces.pid:        # its pid there
            result['inside'] = self._plan.processes[0].vpid
        self._channel.send(TreeRuns(roots[0], len(self._plan.tasks)))
        if self._request.wait:
            self._channel.send(Phase('attend'))
            # of a pid namespace of its own we have only the first process, which ends like the root
            status = attend([init.tid] if init else roots, self._channel)
            result |= {} if status is None else {'exit_status': status}
        self._channel.finish('', (), result)

    def _on_bytes(self, count: int) -> None:
        self._bytes_done += count
        tasks = len(self._plan.tasks)
        self._channel.progress(tasks, tasks, self._bytes_done, self._bytes_total)


def restore(job: JobContext[RestoreRequest]) -> None:
    """Restore the tree of an image."""
    clock = Clock()
    job.channel.phase('verify')
    with ExitStack() as stack:
        files = stack.enter_context(job.image_files())
        records: Records = {}
        with clock.measure('verify'):
            damages = verify_records(files, records=records)
        if damages:
            raise damaged(damages)
        reader = stack.enter_context(ImageReader(files, records=records))
        digests = stack.enter_context(Digests(files))
        job.channel.phase('plan')
        with clock.measure('plan'):
            plan, rows = prepare(job, reader)
        if any(row.severity == 'refusal' for row in rows):
            raise refused(rows)
        fault('planned')
        Restore(job, reader, plan, rows, clock).run(digests)
