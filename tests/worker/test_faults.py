# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever dies or fails, at whatever point: the tree runs on unharmed, and nothing is left behind."""

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ckptd.bus.client import connect
from ckptd.faults import POINTS
from ckptd.kernel.task import read_children
from tests.lib.bus import ROOT, Daemon
from tests.lib.victim import Victim
from tests.worker.faulty import Api, Gate, Standing, api, end, readable
from tests.worker.unharmed import Subject, left_in_journal, left_in_spool

pytestmark = [pytest.mark.needs('root', 'cgroup2', 'ptrace', 'gcc', 'dbus'), pytest.mark.timeout(120)]

# how a tree is frozen, and what becomes of it
WAYS: dict[str, dict[str, str]] = {
    'moved': {'freeze': 'cgroup'},      # out of the cgroup that it shares with the tests
    'in-place': {'freeze': 'cgroup'},   # in a cgroup of its own
    'ptrace': {'freeze': 'ptrace'},
    'hold': {'freeze': 'cgroup', 'after': 'freeze'},
    'kill': {'freeze': 'cgroup', 'after': 'kill'}}
BEFORE = ('resolved', 'scanned')
DUMP = ('seized', 'issued-again')
READ = ('asleep-again', 'running-remote', 'remote-mapped', 'state-read', 'memory-half', 'memory-read')
RELEASE = ('restored', 'released')
PUBLISH = ('written', 'sealed', 'name-kept', 'published')
MAKE = ('freeze-begin', 'freeze-make', 'freeze-make-done', 'freeze-freeze', 'freeze-freeze-done', 'freeze-move',
        'freeze-move-done')
LET_RUN = ('let-run-freeze', 'let-run-freeze-done')
# every point that a checkpoint passes when nothing fails
PASSED: dict[str, tuple[str, ...]] = {
    'moved': (*BEFORE, *MAKE, 'frozen', 'rescanned', 'seized-one', *DUMP, *LET_RUN, *READ, 'undo-move', 'undo-make',
              *RELEASE, *PUBLISH),
    'in-place': (*BEFORE, 'freeze-begin', 'freeze-freeze', 'freeze-freeze-done', 'frozen', 'rescanned', 'seized-one',
                 *DUMP, *LET_RUN, *READ, *RELEASE, *PUBLISH),
    'ptrace': (*BEFORE, 'freeze-begin', 'freeze-seize', 'freeze-seize-done', 'frozen', 'rescanned', *DUMP, *READ,
               *RELEASE, *PUBLISH),
    'hold': (*BEFORE, *MAKE, 'frozen', 'rescanned', 'seized-one', *DUMP, *LET_RUN, *READ, *PUBLISH, 'hold-freeze',
             'hold-freeze-done', 'undo-move', 'undo-freeze', 'undo-make')}


class Case(NamedTuple):
    """A fault at a point that a worker comes by for the nth time; an error at `first` led it there."""
    way: str
    point: str
    nth: int = 1
    first: str = ''

    def __str__(self) -> str:
        return '-'.join(str(part) for part in (self.way, self.first, self.point, self.nth) if part not in ('', 1))


# passed where something waits in the queue of a socket
QUEUES = ('walking-queues', 'queue-walked', 'walked-queues')
# passed where something waits in a terminal of a tree that is killed
TAKEN = ('taken-one', 'taken-out')
CASES = [
    *(Case('moved', point) for point in PASSED['moved'] if point != 'asleep-again'),
    # the first run of code in a process maps memory, the next ones ask, the last one unmaps
    *(Case('moved', 'running-remote', nth) for nth in (2, 3)),
    *(Case('moved', point, first='rescanned') for point in ('undo-move', 'undo-freeze', 'undo-make')),
    *(Case('in-place', point) for point in ('freeze-freeze', 'freeze-freeze-done', 'seized', *LET_RUN)),
    Case('in-place', 'undo-freeze', first='seized'),
    *(Case('ptrace', point) for point in ('freeze-begin', 'freeze-seize', 'freeze-seize-done', 'frozen',
                                          'running-remote', 'memory-read', 'restored', 'released')),
    *(Case('hold', point) for point in ('published', 'hold-freeze', 'hold-freeze-done')),
    *(Case('kill', point) for point in ('memory-read', 'sealed', 'published')),
    *(Case('moved', point) for point in QUEUES),
    *(Case('kill', point) for point in TAKEN),
    Case('kill', 'taken-one', 2),
    Case('moved', 'asleep-again')]
VICTIMS = ('interrupted', 'signals', 'tree', 'registers', 'pipes', 'threads')
ERRORS = ('ENOSPC', 'EIO')
ROUGH = {'CKPTD_VICTIM_ROUGH': '1'}       # sleeps need not end to the moment where a tracer dies in the middle
WITHOUT_CALLER = ('resolved', 'freeze-move', 'seized', 'memory-half', 'undo-move', 'written', 'hold-freeze')


class Trial:
    """A daemon whose workers ask, and the victims of one case."""

    def __init__(self, case: Case, gate: Gate, start_daemon: Callable[..., Daemon],
                 start_victim: Callable[..., Victim], cgroup: Path) -> None:
        self.case, self.gate = case, gate
        self._start_daemon, self._start_victim, self._cgroup = start_daemon, start_victim, cgroup
        self._number = CASES.index(case)
        self._subjects: list[Subject] = []
        self.failures: dict[str, list[str]] = {}
        self.daemon = self.start()

    def start(self) -> Daemon:
        return self._start_daemon(env=self.gate.environment)

    def note(self, action: str, *sentences: str) -> None:
        if sentences:
            self.failures.setdefault(action, []).extend(sentences)

    def subject(self) -> Subject:
        """A new victim; each case and each action has another one."""
        name = VICTIMS[(self._number + len(self._subjects)) % len(VICTIMS)]
        if self.case.point in QUEUES:
            name = 'unix_sockets'
        name, args = ('terminals', ['unread']) if self.case.point in TAKEN else (name, [])
        self._subjects.append(Subject.of(self._start_victim(
            name, *args, env=ROUGH, cgroup=self._cgroup if self.case.way == 'in-place' else None)))
        return self._subjects[-1]

    async def stand(self) -> Standing:
        async with asyncio.timeout(20):
            if self.case.first:
                with await self.gate.stand(self.case.first) as standing:
                    standing.answer('error:EIO')
            return await self.gate.stand(self.case.point, self.case.nth)

    @contextlib.asynccontextmanager
    async def at_the_point(self, action: str) -> AsyncIterator[tuple[Api, str, Standing, Subject]]:
        """A checkpoint of a new victim whose worker has come to the point. The victim is looked at afterwards."""
        subject = self.subject()
        async with api(self.daemon) as client:
            job = await client.checkpoint(subject.victim.pid, WAYS[self.case.way])
            with await self.stand() as standing:
                yield client, job, standing, subject
        self.look(action, subject)

    def look(self, action: str, subject: Subject) -> None:
        self.note(action, *subject.wrong(), *left_in_spool(self.daemon.spool), *left_in_journal(self.daemon.runtime))
        if subject.victim.name != 'interrupted':        # those end all together, each takes its two seconds
            self.note(action, *subject.finish())
            self._subjects.remove(subject)

    def finish(self) -> None:
        for subject in self._subjects:
            subject.victim.go()
        for subject in self._subjects:
            try:
                subject.victim.expect_success()
            except AssertionError as error:
                self.note(str(subject.victim), str(error))
        assert self.failures == {}, self.daemon.log


# ---------------------------------------------------------------- what happens at the point

async def both_die(trial: Trial) -> None:
    """The next daemon puts right what they left."""
    subject = trial.subject()
    async with api(trial.daemon) as client:
        await client.checkpoint(subject.victim.pid, WAYS[trial.case.way])
        with await trial.stand() as standing:
            await end(trial.daemon)
            standing.kill()
            await standing.gone()
    trial.daemon = trial.start()
    trial.look('both die', subject)


async def worker_dies(trial: Trial) -> None:
    async with trial.at_the_point('worker dies') as (client, job, standing, _):
        standing.kill()
        after = await client.ended(job)
    if after['State'] != 'failed' or after['Error']['name'] != 'org.ckptd1.Error.WorkerDied':
        trial.note('worker dies', f'job: {after}')


async def error(trial: Trial) -> None:
    """An error that nobody expects there."""
    name = ERRORS[CASES.index(trial.case) % len(ERRORS)]
    async with trial.at_the_point(name) as (client, job, standing, _):
        standing.answer(f'error:{name}')
        async with trial.gate.open():
            after = await client.ended(job)
            await standing.gone()
    # a freezer that cannot is EOPNOTSUPP, with the reason in the text
    expected = os.strerror(errno.EIO if trial.case.first else getattr(errno, name))
    if after['State'] != 'failed' or expected not in str(after['Error']['message']):
        trial.note(name, f'job: {after}')


async def cancel(trial: Trial) -> None:
    async with trial.at_the_point('cancel') as (client, job, standing, subject):
        await client.cancel(job)
        standing.answer()
        async with trial.gate.open():
            after = await client.ended(job)
            if (trial.case.way, after['State']) == ('hold', 'done'):
                await client.thaw(subject.victim.pid)
            await standing.gone()
    # after the last look at what the daemon says, a job is done; and one that has failed is not cancelled
    late = trial.case.point in ('released', *PUBLISH) or trial.case.way == 'hold'
    if after['State'] != 'cancelled' and not late and not trial.case.first:
        trial.note('cancel', f'job: {after}')


async def caller_leaves(trial: Trial) -> None:
    """The job goes on without its caller."""
    if trial.case.point not in WITHOUT_CALLER or trial.case.first or trial.case.way == 'kill':
        return
    subject = trial.subject()
    async with api(trial.daemon) as client:
        async with await connect(trial.daemon.address) as caller:
            job = await Api(caller, client.signals).checkpoint(subject.victim.pid,
                                                               {**WAYS[trial.case.way], 'detach': True})
            standing = await trial.stand()
        with standing:
            standing.answer()
            async with trial.gate.open():
                after = await client.ended(job)
                if trial.case.way == 'hold':
                    await client.thaw(subject.victim.pid)
                await standing.gone()
    trial.look('caller leaves', subject)
    if after['State'] != 'done':
        trial.note('caller leaves', f'job: {after}')


async def daemon_dies(trial: Trial) -> None:
    """The worker lets go of the tree by itself."""
    async with trial.at_the_point('daemon dies') as (_, _, standing, _):
        await end(trial.daemon)
        standing.answer()
        async with trial.gate.open():
            await standing.gone()


ACTIONS: tuple[Callable[[Trial], Awaitable[None]], ...] = (
    both_die, worker_dies, error, cancel, caller_leaves, daemon_dies)


@pytest.mark.parametrize('case', CASES, ids=str)
async def test_fault(case: Case, gate: Gate, start_daemon: Callable[..., Daemon], victim: Callable[..., Victim],
                     cgroup: Path) -> None:
    trial = Trial(case, gate, start_daemon, victim, cgroup)
    for action in ACTIONS:
        await action(trial)
    trial.finish()


@pytest.mark.parametrize('way', PASSED)
async def test_every_point_is_passed(way: str, gate: Gate, start_daemon: Callable[..., Daemon],
                                     victim: Callable[..., Victim], cgroup: Path) -> None:
    running = victim('signals', cgroup=cgroup if way == 'in-place' else None)
    async with api(start_daemon(env=gate.environment)) as client, gate.open():
        job = await client.checkpoint(running.pid, WAYS[way])
        assert (await client.ended(job))['State'] == 'done'
        if way == 'hold':
            await client.thaw(running.pid)
    assert tuple(dict.fromkeys(gate.passed)) == PASSED[way]
    running.finish()


def test_no_point_was_forgotten() -> None:
    assert {point for points in PASSED.values() for point in points} | {*QUEUES, *TAKEN} >= POINTS
    assert {case.point for case in CASES} >= POINTS


# ---------------------------------------------------------------- the private daemon's client

@pytest.mark.parametrize('point', ['scanned', 'freeze-move-done', 'seized', 'running-remote', 'memory-half', 'restored',
                                   'written', 'published'])
async def test_the_client_of_a_private_daemon_is_killed(point: str, gate: Gate, spool: Path,
                                                        victim: Callable[..., Victim]) -> None:
    """Its daemon ends with it, and the job with the daemon."""
    subject = Subject.of(victim('interrupted', env=ROUGH))
    client = await asyncio.create_subprocess_exec(
        sys.executable, '-m', 'ckptd.cli', 'checkpoint', '--standalone', '--spool', str(spool), '--freeze', 'cgroup',
        str(subject.victim.pid), env={**os.environ, **gate.environment}, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(30):
        standing = await gate.stand(point)
    with standing:
        [daemon] = read_children(client.pid, client.pid)
        pidfd = os.pidfd_open(daemon)
        try:
            client.send_signal(signal.SIGKILL)
            await client.wait()
            standing.answer()
            async with gate.open():
                await standing.gone()
                await readable(pidfd)
        finally:
            os.close(pidfd)
    assert subject.wrong() == []
    assert list(left_in_spool(spool)) == []
    # its journal is the system's
    assert [entry for entry in left_in_journal(Path('/run/ckptd')) if f'process {subject.victim.pid}"' in entry] == []
    assert subject.finish() == []
