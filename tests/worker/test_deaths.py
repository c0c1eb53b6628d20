# SPDX-License-Identifier: LGPL-2.1-or-later
"""A target that dies at any moment of its checkpoint: the error says so, and what is left of its tree runs on."""

import dataclasses
import os
import signal
import subprocess
from pathlib import Path

import pytest

from ckptd.errors import NoSuchTarget, TreeChanged
from ckptd.image.verify import verify
from ckptd.inspect.checks import check_tree
from ckptd.inspect.scan import scan_tree
from ckptd.journal import Journal, recover
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_children
from ckptd.protocol.requests import Caller
from ckptd.tree import Tree
from tests.lib import settled
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place
from tests.worker.faulty import asking
from tests.worker.test_faults import PASSED, PUBLISH, RELEASE, WAYS

pytestmark = [pytest.mark.needs('root', 'cgroup2', 'ptrace', 'gcc'), pytest.mark.timeout(60)]

# the image is complete by then
AFTERWARDS = ('undo-move', 'undo-make', *RELEASE, *PUBLISH)
CODE = r"""
#include <pthread.h>
#include <unistd.h>
static void *thread(void *unused) { for (;;) pause(); }
int main(void)
{
    pthread_t one;
    if (fork() == 0) {
        pthread_create(&one, 0, thread, 0);
        pthread_create(&one, 0, thread, 0);
        (void)!write(1, "r", 1);
    }
    close(1);
    for (;;) pause();
}
"""


@pytest.fixture(scope='module')
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp('program')
    (directory / 'tree.c').write_text(CODE)
    subprocess.run(['gcc', '-O1', '-pthread', '-o', directory / 'tree', directory / 'tree.c'], check=True)
    return directory / 'tree'


def of_child(root: int, child: int) -> int:
    return child


def of_root(root: int, child: int) -> int:
    return root


CASES = [(way, point) for way in ('moved', 'ptrace') for point in PASSED[way] if point != 'asleep-again']


@pytest.mark.parametrize(('way', 'point'), CASES)
def test_a_target_that_dies(program: Path, tmp_path: Path, way: str, point: str) -> None:
    place, freeze = Place(tmp_path).make(), WAYS[way]['freeze']
    for choose in (of_child, of_root):
        with subprocess.Popen([program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read() == b'r'
            [child] = read_children(process.pid, process.pid)
            try:
                check(place, process, choose(process.pid, child), freeze, point)
            finally:
                for pid in (child, process.pid):
                    os.kill(pid, signal.SIGKILL)


def check(place: Place, process: 'subprocess.Popen[bytes]', dies: int, freeze: str, point: str) -> None:
    request = place.request(process.pid, freeze=freeze)

    def kill() -> None:
        os.kill(dies, signal.SIGKILL)
        while read_status(dies).state != 'Z':
            os.sched_yield()

    with asking(place.path / 'ask', point, 1, kill) as env, DirectWorker(env=env) as worker:
        try:
            worker.run(request)
        except (NoSuchTarget, TreeChanged):
            assert point not in AFTERWARDS
            assert not any(place.spool.iterdir())
        else:
            # a child that dies before the tree is at rest is no part of it
            assert point in AFTERWARDS or dies != process.pid, point
            assert verify(place.spool / request.image) == []
            (place.spool / request.image).rename(place.path / request.image)
    assert not place.freezes
    if dies != process.pid:
        status = read_status(process.pid)
        assert (status.state, status.tracer_pid) == ('S', 0)


@pytest.mark.parametrize('freeze', ['cgroup', 'ptrace'])
def test_a_worker_that_dies_while_it_ends_the_tree(program: Path, tmp_path: Path, freeze: str) -> None:
    """It has killed the root; the next recovery ends the child."""
    place = Place(tmp_path).make()
    with subprocess.Popen([program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b'r'
        [child] = read_children(process.pid, process.pid)
        request = place.request(process.pid, freeze=freeze, after='kill')
        try:
            with DirectWorker(env={'CKPTD_FAULT': 'kill-one=kill'}) as worker, \
                    pytest.raises(AssertionError, match='the worker died'):
                worker.run(request)
            assert read_status(child).state != 'Z', 'what is to be shown has not happened'
            assert any('ending 2 processes' in sentence for sentence in recover(Journal(place.runtime)))
            assert read_status(child).state == 'Z'
        finally:
            os.kill(child, signal.SIGKILL)
            process.kill()
    settled.reap_orphans()
    assert not place.freezes
    assert verify(place.spool / request.image) == []


def test_the_number_of_a_task_that_has_died_is_anothers() -> None:
    """What the caller may not do with that one says nothing about the task."""
    caller = Caller(ORDINARY_UID, ORDINARY_UID)
    tree = scan_tree([os.getpid()])
    assert {row.errno for row in check_tree(tree, caller)} == {'EPERM'}
    changed = Tree(tuple(dataclasses.replace(task, start_time=1) for task in tree))
    assert {(row.errno, row.reason) for row in check_tree(changed, caller)} == {('EAGAIN', 'died during the scan')}
