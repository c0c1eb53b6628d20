# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every victim is dumped, killed and restored: as it was by /proc, and by its own check; then all of that once more."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.errors import Busy, CkptError
from ckptd.protocol.messages import Start, TreeRuns
from tests.lib import settled
from tests.lib.procdiff import Picture, changes_of_restart, take_picture
from tests.lib.victim import BRIEF, RESTLESS, Victim, build, kill_session, names, session_members
from tests.worker.driver import DirectWorker, Place

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]


class Generation:
    """A victim's tree under one pid, killed and restored any number of times."""

    def __init__(self, place: Place, victim: Victim) -> None:
        self.place, self.victim = place, victim
        self._alive_by_popen = True

    def look(self) -> Picture:
        if self.victim.name not in BRIEF:
            self.victim.await_waiting()     # on a busy machine it has yet to come back to where it was
        return take_picture(self.victim.pid, moving=self.victim.name in RESTLESS | BRIEF)

    def kill(self, **more: object) -> Path:
        """The image of the tree, which is dead and gone afterwards."""
        members = set(session_members(self.victim.pid))     # of other sessions, too, which have lost their parents then
        image = self.place.checkpoint(self.victim.pid, after='kill', **more)
        if self._alive_by_popen:
            self.victim.process.wait()
            self._alive_by_popen = False
        deadline = time.monotonic() + 10
        while any(Path(f'/proc/{pid}').exists() for pid in members) and time.monotonic() < deadline:
            settled.reap_orphans()      # parents first: what they leave becomes ours
            os.sched_yield()
        return image

    def restore(self, image: Path, **more: object) -> None:
        with DirectWorker() as worker:
            result = worker.run(self.place.request(0, operation='restore', image=image.name, **more))
        assert result['root'] == self.victim.pid

    def finish(self) -> None:
        """Have it check itself. Its root is a child of ours, as of the subreaper."""
        self.victim.go()
        _, status = os.waitpid(self.victim.pid, 0)
        assert status == 0, f'{self.victim} ended with {status:#x}:\n{self.victim.output}'


@pytest.fixture
def generation(victim: Callable[..., Victim], place: Place) -> Iterator[Callable[..., Generation]]:
    made: list[Generation] = []

    def start(name: str, *args: str, **more: object) -> Generation:
        made.append(Generation(place, victim(name, *args, **more)))
        return made[-1]

    yield start
    for one in made:
        kill_session(one.victim.pid)
        settled.reap_orphans()


@pytest.mark.parametrize('name', sorted(names()))
def test_comes_back(generation: Callable[..., Generation], name: str) -> None:
    """What was restored is dumped, killed and restored again."""
    is_brief = name in BRIEF
    tree = generation(name, *(['8'] if is_brief else []))
    before = tree.look()
    tree.restore(tree.kill())
    assert changes_of_restart(before, tree.look(), brief=is_brief) == []
    tree.restore(tree.kill(freeze='ptrace'))
    assert changes_of_restart(before, tree.look(), brief=is_brief) == []
    tree.finish()


@pytest.mark.parametrize('name', ['signals', 'threads'])
def test_after_twenty_checkpoints(generation: Callable[..., Generation], name: str) -> None:
    """Of one running tree, in a row; the last one is restored."""
    tree = generation(name)
    for _ in range(19):
        tree.place.checkpoint(tree.victim.pid)
    tree.restore(tree.kill())
    tree.finish()


@pytest.mark.parametrize('name', ['threads', 'tree'])
def test_one_of_several_at_once(generation: Callable[..., Generation], name: str) -> None:
    """The pids are free for one of them; the others leave nothing."""
    tree = generation(name)
    image = tree.kill()

    def attempt(job: int) -> CkptError | None:
        try:
            tree.restore(image, job=job)
        except CkptError as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(attempt, range(1, 5)))
    assert outcomes.count(None) == 1, outcomes
    assert {type(error) for error in outcomes} == {Busy, type(None)}, outcomes
    assert not tree.place.freezes
    tree.finish()


@pytest.mark.parametrize('upgraded', [False, True])
def test_a_program_that_was_deleted(generation: Callable[..., Generation], tmp_path: Path, upgraded: bool) -> None:
    """While it ran, as every upgrade does; its name may be another program's."""
    program = Path(shutil.copy(build('pipes'), tmp_path / 'program'))
    tree = generation('pipes', program=program)
    program.unlink()
    if upgraded:
        shutil.copy('/bin/true', program)
    before = tree.look()
    tree.restore(tree.kill())
    after = tree.look()
    for key, value in after.rows.items():       # its own name, where that is free
        after.rows[key] = re.sub(r'/[.](program)[.]\w{8}(?= [(]deleted)', r'/\1', value) if upgraded else value
    assert changes_of_restart(before, after) == []
    tree.restore(tree.kill())
    tree.finish()


def test_a_subshell_that_has_started_a_program(place: Place) -> None:
    """The program is no heir of a shell that is one itself."""
    with subprocess.Popen(['sh', '-c', '(sleep 1000; exit 3); exit 4'], start_new_session=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as shell:
        pid = shell.pid
        try:
            deadline = time.monotonic() + 10
            while not (sleeping := [one for one in session_members(pid) if _comm(one) == 'sleep']):
                assert time.monotonic() < deadline
                os.sched_yield()
            image = place.checkpoint(pid, after='kill')
            shell.wait()
            settled.reap_orphans()
            with DirectWorker() as worker:
                worker.run(place.request(0, operation='restore', image=image.name))
            os.kill(sleeping[0], 9)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
        finally:
            for one in session_members(pid):
                os.kill(one, 9)


def _comm(pid: int) -> str:
    try:
        return Path(f'/proc/{pid}/comm').read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ''


def test_dead_leaders_of_a_tree_that_is_waited_for(generation: Callable[..., Generation]) -> None:
    """No dead leader is traced any more, so its parent learns of the end of the process, and no signal of the tracer's
    end can be left pending in it."""
    tree = generation('headless')
    image = tree.kill()
    with DirectWorker() as worker:
        worker.send(Start(tree.place.request(0, operation='restore', image=image.name, wait=True)))
        while not isinstance(worker.receive(), TreeRuns):
            continue
        dead = [status for pid in session_members(tree.victim.pid)
                if 'zombie' in (status := Path(f'/proc/{pid}/status').read_text())]
        assert len(dead) == 2
        assert all('TracerPid:\t0\n' in status and 'SigPnd:\t0000000000000000\n' in status for status in dead)
        tree.victim.go()
        assert worker.result()['exit_status'] == 0, tree.victim.output


def test_left_stopped(generation: Callable[..., Generation]) -> None:
    """As by SIGSTOP, every process of it; SIGCONT has it go on."""
    tree = generation('pipes')
    tree.restore(tree.kill(), leave_stopped=True)
    members = session_members(tree.victim.pid)
    states = {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] for pid in members}
    assert len(members) == 2
    assert states == {'T'}
    for pid in members:
        os.kill(pid, 18)
    tree.finish()


def test_the_same_twice_is_refused_by_pid(generation: Callable[..., Generation]) -> None:
    tree = generation('memory')
    image = tree.kill()
    tree.restore(image)
    with pytest.raises(Busy, match=f'pid {tree.victim.pid}: the pid is in use by memory') as refused:
        tree.restore(image)
    assert 'new-pidns' in refused.value.hint
    tree.finish()
