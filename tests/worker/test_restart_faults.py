# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever dies or fails while a tree is restored: it is all there and runs, or nothing of it is left."""

import asyncio
import errno
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from ckptd.faults import RESTORE_POINTS
from ckptd.image.reader import ImageReader
from ckptd.image.records import SYSV, SharedMemory
from tests.lib import settled
from tests.lib.bus import Daemon
from tests.lib.victim import Victim, kill_session
from tests.worker.faulty import Api, Gate, Standing, api, end, readable
from tests.worker.unharmed import left_in_journal, left_in_spool

pytestmark = [pytest.mark.needs('root', 'cgroup2', 'ptrace', 'gcc', 'dbus'), pytest.mark.timeout(90)]

SETTLE = 20.0       # seconds: what was killed a moment ago is still on its way
PATIENCE = 15.0     # seconds for a worker to come to its point
NOTHING = ('planned', 'place-make', 'place-make-done', 'opened', 'created-one', 'created', 'filled', 'shed', 'rebuilt',
           'place-freeze', 'place-freeze-done', 'place-move', 'place-move-done', 'ready', 'started')
ALIVE = ('place-alive', 'undo-move', 'undo-freeze', 'undo-make')
FORGOTTEN = 'undo-make-file'    # of what was kept of rolled-back files, when the tree lives
VICTIMS = ('threads', 'files', 'pipes', 'shared', 'stopped')
REWRITTEN = 'files'     # whose files are rolled back
GONE = ('place-make-file', 'place-make-file-done')      # points where one of them is made again


class Case(NamedTuple):
    """A fault at a point that a worker comes by for the nth time."""
    victim: str
    point: str
    nth: int = 1

    def __str__(self) -> str:
        return '-'.join(str(part) for part in self if part != 1)


CASES = [*(Case(VICTIMS[number % len(VICTIMS)], point) for number, point in enumerate((*NOTHING, *ALIVE))),
         *(Case('tree', 'created-one', nth) for nth in (2, 30)), Case('tree', 'started'), Case('shared', 'filled'),
         Case('shared', 'started'), Case('stopped', 'started'),
         *(Case(REWRITTEN, point, nth) for point in ('place-keep-file', 'place-keep-file-done') for nth in (1, 2)),
         *(Case(REWRITTEN, point) for point in ('place-committed', 'started', 'place-alive', FORGOTTEN)),
         *(Case(REWRITTEN, point) for point in GONE),
         *(Case('unix_names', point) for point in ('place-bind-socket', 'place-bind-socket-done', 'rebuilt', 'started',
                                                   'place-alive'))]


def segments(shmids: set[int]) -> set[int]:
    """Those of the System V segments that there are."""
    return shmids & {int(line.split()[1]) for line in Path('/proc/sysvipc/shm').read_text().splitlines()[1:]}


def files_below(directory: Path) -> dict[Path, tuple[int, int, bytes]]:
    """What is in a victim's directory: inode, mode and content of each file."""
    return {path: (path.lstat().st_ino, path.lstat().st_mode, path.read_bytes() if path.is_file() else b'')
            for path in sorted(directory.rglob('*'))}


async def until(is_so: Callable[[], bool]) -> None:
    """Ask again and again, for what no event tells."""
    async with asyncio.timeout(PATIENCE):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def is_dead(pid: int) -> bool:
    return not Path(f'/proc/{pid}').exists() or settled.is_zombie(pid)


async def ended(root: int) -> int:
    """Wait for a child of ours; its wait(2) status."""
    pidfd = os.pidfd_open(root)
    try:
        await readable(pidfd)
    finally:
        os.close(pidfd)
    return os.waitpid(root, os.WNOHANG)[1]  # noqa: ASYNC222 - it is dead


def mounts_but_of_others(ours: Path) -> Iterator[str]:
    """Lines of mountinfo, without what other tests have mounted in directories of theirs."""
    for line in Path('/proc/self/mountinfo').read_text().splitlines(keepends=True):
        at = Path(line.split()[4])
        if not any(part.startswith('pytest-of-') for part in at.parts) or at.is_relative_to(ours):
            yield line


def cgroups_below(top: Path) -> Iterator[Path]:
    """With itself; os.walk() does not mind that one goes meanwhile, as Path.rglob() does."""
    return (Path(path) for path, _, _ in os.walk(top))


class Surroundings(NamedTuple):
    """What a restart that fails leaves as it was."""
    files: dict[Path, tuple[int, int, bytes]]
    segments: set[int]
    cgroups: set[Path]
    mounts: str

    @classmethod
    def of(cls, trial: 'Trial') -> 'Surroundings':
        return cls(files_below(trial.victim.directory), segments(trial.shmids), set(cgroups_below(trial.cgroup)),
                   ''.join(mounts_but_of_others(trial.daemon.spool.parent)))


class Trial:
    """A daemon whose workers ask, and the image of a victim that is dead."""

    def __init__(self, case: Case, gate: Gate, start_daemon: Callable[..., Daemon], victim: Callable[..., Victim],
                 cgroup: Path) -> None:
        self.case, self.gate, self.cgroup = case, gate, cgroup
        self._start_daemon, self._start_victim = start_daemon, victim
        self._others = set(self._members())
        self.daemon = self.start()
        self.victim, self.image = victim(case.victim), ''
        self.numbers, self.shmids = set[int](), set[int]()
        self.failures: list[str] = []

    def start(self) -> Daemon:
        return self._start_daemon(env=self.gate.environment)

    async def dump(self, client: Api) -> None:
        there = set(self.cgroup.glob('ckptd-*'))
        async with self.gate.open():
            job = await client.checkpoint(self.victim.pid, {'after': 'kill', 'save_files': True})
            self.image = str((await client.ended(job))['Image'])
            self.victim.process.wait()
            settled.reap_orphans()
            # its worker still comes by points while it removes the cgroup, which goes with the last of the dead
            await until(lambda: set(self.cgroup.glob('ckptd-*')) <= there)
        with ImageReader(self.daemon.spool / self.image) as reader:
            # the dead that a session or group is named by are made, too
            self.numbers = {number for task in reader.tasks for number in (task.vpid, task.vpgid, task.vsid)} - {0}
            self.shmids = {record.shmid for record in reader.every(SharedMemory) if record.kind == SYSV}
        if self.case.victim == REWRITTEN:
            self._change_files()
        self.before = Surroundings.of(self)

    def _change_files(self) -> None:
        """Two files go on living after the checkpoint, and where the tree is not to run, a third ends."""
        with (self.victim.directory / 'data').open('r+b') as data:
            data.write(b'somebody else' * 5000)
        with (self.victim.directory / 'log').open('ab') as log:
            log.write(b'after\n')
        if self.case.point in GONE:
            (self.victim.directory / 'log').unlink()

    async def begin(self, client: Api) -> str:
        """The path of a job that restores."""
        options = {'changed_files': 'rollback'} if self.case.victim == REWRITTEN else {}
        return str(await client.client.call(BUS_NAME, ROOT, MANAGER, 'Restore', 'sa{sv}', self.image, options))

    @asynccontextmanager
    async def at_the_point(self) -> AsyncIterator[tuple[Api, str, Standing]]:
        """A restart whose worker has come to the point."""
        async with api(self.daemon) as client:
            job = await self.begin(client)
            try:
                async with asyncio.timeout(PATIENCE):
                    standing = await self.gate.stand(self.case.point, self.case.nth)
            except TimeoutError:
                shown = await client.client.properties(BUS_NAME, job, 'org.ckptd1.Job')
                raise AssertionError(f'the job did not come to {self.case.point}: {shown}, {self.failures}') from None
            with standing:
                yield client, job, standing

    def is_there(self) -> bool:
        return Path(f'/proc/{self.victim.pid}').exists()

    # ------------------------------------------------------------ afterwards

    async def look(self, action: str, done: bool) -> None:
        """All or nothing. done: the job says that it has restored the tree."""
        if self.case.point in (*ALIVE, FORGOTTEN) or done:
            await self._all(action)
            return
        deadline = time.monotonic() + SETTLE
        while (left := list(self._left())) and time.monotonic() < deadline:
            settled.reap_orphans()
            await asyncio.sleep(0.01)
        self.failures += [f'{action}: {sentence}' for sentence in left]
        kill_session(self.victim.pid)
        settled.reap_orphans()

    def _left(self) -> Iterator[str]:
        now = Surroundings.of(self)
        yield from (f'process {settled.describe(pid)}' for pid in self.numbers if Path(f'/proc/{pid}').exists())
        yield from (f'{name} is {getattr(now, name)} and was {getattr(self.before, name)}' for name in now._fields
                    if getattr(now, name) != getattr(self.before, name))
        yield from left_in_spool(self.daemon.spool)
        yield from (f'{path} in the spool' for path in self.daemon.spool.glob('.kept-*'))
        yield from left_in_journal(self.daemon.runtime)
        yield from (f'stub {settled.describe(pid)}' for pid in self.stubs())

    def stubs(self) -> Iterator[int]:
        """Whatever runs in our cgroups, has come since the beginning, and is neither a daemon nor a worker of one."""
        for pid in self._members():
            if pid not in self._others and not settled.is_zombie(pid) and not _is_ours(pid):
                yield pid

    def _members(self) -> Iterator[int]:
        for directory in cgroups_below(self.cgroup):
            try:
                yield from map(int, (directory / 'cgroup.procs').read_text().split())
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):     # it is gone
                    raise

    async def _all(self, action: str) -> None:
        """It runs and is whole; the next action gets another one."""
        self.victim.go()
        try:
            if status := await ended(self.victim.pid):
                self.failures.append(f'{action}: the root ended with {status:#x}')
        except (ChildProcessError, ProcessLookupError):
            self.failures.append(f'{action}: no root of the tree')
        except TimeoutError:
            self.failures.append(f'{action}: {self.victim} did not end: {settled.describe(self.victim.pid)}')
        if self.victim.output:
            self.failures.append(f'{action}: {self.victim.output}')
        self.failures += [f'{action}: {sentence}' for sentence in left_in_journal(self.daemon.runtime)]
        self.victim = self._start_victim(self.case.victim)
        async with api(self.daemon) as client:
            await self.dump(client)


def _is_ours(pid: int) -> bool:
    try:
        command = Path(f'/proc/{pid}/cmdline').read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True     # gone
    return b'ckptd.' in command or b'dbus-daemon' in command


# ---------------------------------------------------------------- what happens at the point

async def worker_dies(trial: Trial) -> bool:
    async with trial.at_the_point() as (client, job, standing):
        standing.kill()
        after = await client.ended(job)
    expect(trial, after, 'failed', 'org.ckptd1.Error.WorkerDied')
    return False


async def error(trial: Trial) -> bool:
    """An error that nobody expects there."""
    async with trial.at_the_point() as (client, job, standing):
        standing.answer('error:EIO')
        async with trial.gate.open():
            after = await client.ended(job)
            await standing.gone()
    # without a cgroup to be born in, a tree is born where we are; what comes after it is alive is told as a warning
    if not trial.case.point.startswith(('place-make', 'undo-')):
        expect(trial, after, 'failed', '')
    return bool(after['State'] == 'done')


async def cancel(trial: Trial) -> bool:
    async with trial.at_the_point() as (client, job, standing):
        await client.cancel(job)
        standing.answer()
        async with trial.gate.open():
            after = await client.ended(job)
            await standing.gone()
    if after['State'] != 'done' or trial.case.point in NOTHING[:NOTHING.index('rebuilt')]:
        expect(trial, after, 'cancelled', '')
    return bool(after['State'] == 'done')


async def daemon_dies(trial: Trial) -> bool:
    """The worker ends what it began, or undoes it."""
    async with trial.at_the_point() as (_, _, standing):
        await end(trial.daemon)
        standing.answer()
        async with trial.gate.open():
            await standing.gone()
    trial.daemon = trial.start()
    settled.reap_orphans()
    return trial.is_there()


async def both_die(trial: Trial) -> bool:
    """The next daemon puts right what they left."""
    async with trial.at_the_point() as (_, _, standing):
        await end(trial.daemon)
        standing.kill()
        await standing.gone()
    trial.daemon = trial.start()
    return False


def expect(trial: Trial, after: dict[str, Any], state: str, error_name: str) -> None:
    if after['State'] != state or error_name not in str(after['Error'].get('name', '')):
        trial.failures.append(f'job: {after}')


ACTIONS: tuple[Callable[[Trial], Awaitable[bool]], ...] = (worker_dies, error, cancel, daemon_dies, both_die)


@pytest.mark.parametrize('case', CASES, ids=str)
async def test_all_or_nothing(case: Case, gate: Gate, start_daemon: Callable[..., Daemon],
                              victim: Callable[..., Victim], test_cgroup: Path) -> None:
    trial = Trial(case, gate, start_daemon, victim, test_cgroup)
    async with asyncio.timeout(PATIENCE), api(trial.daemon) as client:
        await trial.dump(client)
    for action in ACTIONS:
        async with asyncio.timeout(2 * PATIENCE):
            done = await action(trial)
        await trial.look(action.__name__, done)
    assert trial.failures == [], '\n'.join([*trial.failures, trial.daemon.log])
    async with api(trial.daemon) as client, gate.open():
        after = await client.ended(await trial.begin(client))
        assert after['State'] == 'done', after
    trial.victim.go()
    assert await ended(trial.victim.pid) == 0, trial.victim.output


STUBS = ('created-one', 'created', 'filled', 'shed', 'rebuilt')         # points at which there is nothing but stubs


@pytest.mark.parametrize('point', [*STUBS, 'place-freeze', 'ready'])
async def test_a_stub_that_is_killed(point: str, gate: Gate, start_daemon: Callable[..., Daemon],
                                     victim: Callable[..., Victim], test_cgroup: Path) -> None:
    """By somebody else, the kernel's OOM killer say: the first of them, or the last."""
    trial = Trial(Case('threads', point), gate, start_daemon, victim, test_cgroup)
    async with asyncio.timeout(PATIENCE), api(trial.daemon) as client:
        await trial.dump(client)
    for pick in (min, max):
        async with asyncio.timeout(2 * PATIENCE), trial.at_the_point() as (client, job, standing):
            stub = pick(trial.stubs())
            os.kill(stub, signal.SIGKILL)
            await until(lambda: is_dead(stub))  # noqa: B023
            standing.answer()
            async with gate.open():
                after = await client.ended(job)
                await standing.gone()
        expect(trial, after, 'failed', 'org.ckptd1.Error.Failed')
        if 'was killed' not in str(after['Error'].get('message', '')):
            trial.failures.append(f'job: {after}')
        await trial.look(pick.__name__, done=False)
    assert trial.failures == [], '\n'.join([*trial.failures, trial.daemon.log])


@pytest.mark.parametrize('name', ['threads', 'tree', 'stopped'])
async def test_stray_signals(name: str, gate: Gate, start_daemon: Callable[..., Daemon],
                             victim: Callable[..., Victim], test_cgroup: Path) -> None:
    """Signals to the pids of a tree that is not there yet change nothing of it."""
    trial = Trial(Case(name, ''), gate, start_daemon, victim, test_cgroup)
    async with asyncio.timeout(PATIENCE), api(trial.daemon) as client:
        await trial.dump(client)
    for point in STUBS:
        trial.case = Case(name, point)
        async with asyncio.timeout(2 * PATIENCE), trial.at_the_point() as (client, job, standing):
            for pid in trial.stubs():
                for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT, signal.SIGTSTP, signal.SIGUSR1):
                    os.kill(pid, number)
            standing.answer()
            async with gate.open():
                after = await client.ended(job)
        assert after['State'] == 'done', after
        await trial.look(point, done=True)
    assert trial.failures == [], '\n'.join([*trial.failures, trial.daemon.log])


async def test_every_point_is_passed(gate: Gate, start_daemon: Callable[..., Daemon], victim: Callable[..., Victim],
                                     test_cgroup: Path) -> None:
    trial = Trial(Case('shared', ''), gate, start_daemon, victim, test_cgroup)
    async with api(trial.daemon) as client:
        await trial.dump(client)
        gate.passed.clear()
        async with gate.open():
            assert (await client.ended(await trial.begin(client)))['State'] == 'done'
    assert tuple(point for point in dict.fromkeys(gate.passed) if point != 'place-committed') == (*NOTHING, *ALIVE)
    trial.victim.go()
    assert await ended(trial.victim.pid) == 0, trial.victim.output


def test_no_point_was_forgotten() -> None:
    assert {case.point for case in CASES} >= RESTORE_POINTS
