# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cgroups: whom a job of a user moves, and where a user's tree lives."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ckptd.errors import TreeChanged
from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.clone import clone_args
from ckptd.kernel.pidfd import pidfd_open, wait_dead
from tests.lib import settled
from tests.lib.bus import Served
from tests.lib.gate import cgroup1_mount, cgroup2_mount
from tests.security.attacker import Attacker, is_frozen, place_of, refused
from tests.worker.faulty import Gate

pytestmark = pytest.mark.needs('cgroup2')


def enter(cgroup: Path, pid: int = 0) -> None:
    (cgroup / 'cgroup.procs').write_text(str(pid))


def name_of(cgroup: Path) -> str:
    """As /proc/PID/cgroup has it."""
    mount = cgroup2_mount()
    assert mount is not None
    return f'/{cgroup.relative_to(mount)}'


@pytest.fixture
def users(cgroup: Path, attacker: Attacker) -> Path:
    """The cgroup of the user's session."""
    path = cgroup / 'users'
    path.mkdir()
    attacker.before.append(lambda: enter(path))
    return path


@pytest.fixture
def roots(cgroup: Path) -> Path:
    """A cgroup of a service of root's."""
    path = cgroup / 'roots'
    path.mkdir()
    return path


# ---------------------------------------------------------------- who is moved

# told to go it ends one of its children, whose number is free then
PARENT = """
children = []
for _ in range(3):
    children.append(os.fork())
    if not children[-1]:
        not_the_one_to_report()
        while True:
            time.sleep(1000)
ready()
wait_for_go()
os.kill(children[1], 9)
os.waitpid(children[1], 0)
say(children[1])
while True:
    time.sleep(1000)
"""


@contextmanager
def process_of(pid: int) -> Iterator[None]:
    """A process of root's with this number, clone3(2)."""
    number = ctypes.c_int32(pid)
    arguments = clone_args(exit_signal=signal.SIGCHLD, set_tid=ctypes.addressof(number), set_tid_size=1)
    # PyDLL keeps the lock of the interpreter, so that the child has it
    made = ctypes.PyDLL(None).syscall(NR['clone3'], ctypes.byref(arguments), ctypes.sizeof(arguments))
    if made == 0:
        try:
            os.execv('/bin/sleep', ['sleep', '1000'])
        finally:
            os._exit(1)
    assert made == pid
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def test_a_number_that_is_another_process_by_now(serve: Callable[..., Served], attacker: Attacker, gate: Gate,
                                                       users: Path, roots: Path) -> None:
    """A child of the tree has ended since the scan, and root has started a process that has got its number."""
    serve(env=gate.environment)
    program = attacker.start(PARENT)
    attacker.start('rest()')        # shares the cgroup, so the tree is moved to one of its own
    seen: list[tuple[Path, bool]] = []
    with attacker.checkpointing(program, freeze='cgroup', after='resume') as call, \
            await gate.stand('freeze-move') as standing:
        child = int(program.ask())
        with process_of(child):
            enter(roots, child)
            gate.look = lambda point, pid: seen.append((place_of(child), is_frozen(place_of(child))))
            standing.answer()
            async with gate.open():
                with suppress(TreeChanged):     # which is as good as an image
                    await call
            assert (place_of(child), is_frozen(place_of(child))) == (roots, False)
    assert seen
    assert set(seen) == {(roots, False)}
    assert place_of(program.pid) == users


# ---------------------------------------------------------------- where a user's tree lives

def test_an_image_names_no_cgroup_of_others(served: Served, attacker: Attacker, users: Path, roots: Path) -> None:
    """What is imported may say anything."""
    image = attacker.take(attacker.start('rest()'))
    assert image.alter('TaskRecord', cgroup=name_of(roots)) == 1
    outcome = attacker.restore(image)
    if not refused(outcome):
        assert place_of(outcome.root) == users


def test_a_user_chooses_no_cgroup_of_others(served: Served, attacker: Attacker, users: Path, roots: Path) -> None:
    image = attacker.checkpoint(attacker.start('rest()'))
    assert attacker.restore(image, cgroup=name_of(roots)).root == 0
    assert (roots / 'cgroup.procs').read_text() == ''
    outcome = attacker.restore(image)
    assert outcome.root, outcome.words
    assert place_of(outcome.root) == users


@pytest.mark.needs('cgroup1')
def test_limits_of_the_old_hierarchies_are_the_askers(served: Served, attacker: Attacker) -> None:
    """On a hybrid machine limits may be there; whoever restores the tree would have it in cgroups of its own."""
    def old(pid: int) -> list[str]:
        return [line for line in Path(f'/proc/{pid}/cgroup').read_text().splitlines() if not line.startswith('0::')]

    mount = cgroup1_mount()
    assert mount is not None
    path = mount / f'ckptd-test-{os.getpid()}'
    path.mkdir()
    try:
        attacker.before.append(lambda: (path / 'cgroup.procs').write_text('0') and None)
        program = attacker.start('rest()')
        before = old(program.pid)
        assert before != old(os.getpid())
        outcome = attacker.restore(attacker.checkpoint(program))
        assert outcome.root, outcome.words
        assert old(outcome.root) == before
        # nothing tells when a cgroup of version 1 is empty; one of which a zombie is left cannot be removed
        pidfd = pidfd_open(outcome.root)
        program.close()
        assert wait_dead(pidfd, 10)
        os.close(pidfd)
        settled.reap_orphans()
    finally:
        path.rmdir()
