# SPDX-License-Identifier: LGPL-2.1-or-later
"""Yama (S5): what its ptrace_scope keeps a user from tracing, a checkpoint does not reach either, unless polkit allows
it; a program that asks for its own checkpoint declares its tracer."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from ckptd.client.sync import SyncCkptd, connect
from ckptd.errors import CkptError, PermissionDenied
from tests.lib.bus import ROOT, Served
from tests.lib.polkit import Polkit
from tests.lib.systembus import SystemBus
from tests.lib.yama import CAP_SYS_PTRACE, Yama
from tests.security.attacker import Attacker, Program, standing, status
from tests.worker.faulty import Gate

pytestmark = pytest.mark.needs('seccomp-notify')

DENIED = 4      # the exit status of PermissionDenied
CHECKPOINT_RESTORE = 1 << 40
SOURCE = """
secret = list(range(1000))
ready()
while True:
    wait_for_go()
    say(sum(secret))
"""
ALIVE = '499500'
YES = """polkit.addRule(function(action, subject) {
    if (action.id == "org.ckptd1.trace-under-yama") return polkit.Result.YES;
});"""


@pytest.fixture
def yama(request: pytest.FixtureRequest) -> Iterator[Yama]:
    with Yama(getattr(request, 'param', 1)) as running:
        yield running


@pytest.fixture
def daemon(yama: Yama, serve: Callable[..., Served]) -> Served:
    return serve(env=yama.environment, module=yama.module)


@pytest.fixture
def program(daemon: Served, attacker: Attacker) -> Program:
    return attacker.start(SOURCE)


def refusal(attacker: Attacker, program: Program) -> str:
    """All that a checkpoint is refused with; the program is asked afterwards."""
    def work(ckptd: SyncCkptd) -> str:
        try:
            ckptd.checkpoint(f'pid:{program.pid}').wait(20)
        except CkptError as error:
            return f'{type(error).__name__}: {error} {error.hint} {error.refusals}'
        return 'done'
    words = attacker.on_bus(work)
    assert program.ask() == ALIVE
    return words


def as_program(attacker: Attacker, *commands: str) -> list[tuple[int, str]]:
    """Exit status and words of each command of ckptctl, as the user."""
    done = subprocess.run([sys.executable, '-m', 'tests.daemon.confined', str(attacker.uid), '', attacker.address,
                           *commands], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[tuple[int, str]] = json.loads(done.stdout)
    return answers


async def test_the_refusal_names_the_rule(yama: Yama, program: Program, attacker: Attacker) -> None:
    words = refusal(attacker, program)
    assert 'kernel.yama.ptrace_scope=1' in words
    assert 'org.ckptd1.trace-under-yama' in words
    assert 'CheckpointSelf' in words
    assert (False, False) in yama.asked
    [row] = attacker.on_bus(lambda ckptd: ckptd.check(f'pid:{program.pid}'))
    assert 'kernel.yama.ptrace_scope=1' in row.reason
    [[denied, words]] = as_program(attacker, f'checkpoint pid:{program.pid}')
    assert denied == DENIED
    assert 'Yama forbids it' in words


async def test_the_freezer_by_ptrace_names_it_too(program: Program, attacker: Attacker) -> None:
    with pytest.raises(PermissionDenied, match='ptrace_scope=1'):
        attacker.on_bus(lambda ckptd: ckptd.freeze(f'pid:{program.pid}', freeze='ptrace'))
    assert program.ask() == ALIVE


@pytest.mark.needs('polkit')
@pytest.mark.parametrize(('yama', 'kept'), [(1, {'scanned'}), (2, {'scanned', 'memory-half'})], indirect=['yama'])
async def test_what_polkit_allows(bus: SystemBus, serve: Callable[..., Served], yama: Yama, gate: Gate,
                                  attacker: Attacker, kept: set[str]) -> None:
    """The worker has the right for as long as it must, and has lost it before it writes."""
    program = attacker.start(SOURCE)
    with Polkit(bus, YES):
        daemon = serve(env={**gate.environment, **yama.environment}, module=yama.module)
        with attacker.checkpointing(program) as call:
            for point in ('scanned', 'memory-half', 'written'):
                with await standing(gate, point, call) as worker:
                    rights = CHECKPOINT_RESTORE | (CAP_SYS_PTRACE if point in kept else 0)
                    assert rights_of(worker.pid) == (rights, rights, 0, 0), point
                    assert status(worker.pid)['Uid'].split() == [str(attacker.uid)] * 4
                    worker.answer()
            async with gate.open():
                image = await call
        program.wait_dead()
        assert f'allowed method=Checkpoint uid={attacker.uid}' in daemon.log
        daemon.stop()
    assert (True, True) in yama.asked
    serve()     # without Yama: what is restored would be under its filter
    outcome = attacker.restore(image)
    assert outcome.root == program.pid, outcome.words
    assert program.ask() == ALIVE


def rights_of(pid: int) -> tuple[int, ...]:
    rows = status(pid)
    return tuple(int(rows[name], 16) for name in ('CapEff', 'CapPrm', 'CapInh', 'CapAmb'))


@pytest.mark.needs('polkit')
@pytest.mark.parametrize(('yama', 'rules', 'words'), [
    pytest.param(1, '', 'that a person must give', id='a person must be asked'),
    pytest.param(1, YES.replace('YES', 'NO'), 'ptrace_scope=1', id='no'),
    pytest.param(3, YES, 'ptrace_scope=3', id='nobody may')], indirect=['yama'])
async def test_what_polkit_does_not_allow(bus: SystemBus, serve: Callable[..., Served], yama: Yama,
                                          attacker: Attacker, rules: str, words: str) -> None:
    program = attacker.start(SOURCE)
    with Polkit(bus, rules):
        daemon = serve(env=yama.environment, module=yama.module)
        assert words in refusal(attacker, program)
        daemon.stop()
    assert not [question for question in yama.asked if question == (True, True)]


async def test_root_is_not_kept_by_it(yama: Yama, program: Program, daemon: Served) -> None:
    with connect(daemon.address) as ckptd:
        assert ckptd.checkpoint(f'pid:{program.pid}').wait(20).tasks == 1
    assert program.ask() == ALIVE


# ---------------------------------------------------------------- CheckpointSelf

# in the place of PR_SET_PTRACER it tells the test
ITSELF = """
import json, os, sys
from ckptd.client import itself
from ckptd.errors import CkptError
from tests.lib.brood import PR_SET_DUMPABLE, libc
from tests.lib.yama import declare_at
uid, address, home = int(sys.argv[1]), *sys.argv[2:]
declared = []
def set_ptracer(pid):
    declared.append(pid)
    return bool(home) and declare_at(home, pid)
itself.set_ptracer = set_ptracer
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
try:
    outcome = itself.checkpoint_self(address)
except CkptError as error:
    outcome = f'{error} {error.refusals}'
print(json.dumps([outcome, declared]))
"""


def checkpoint_itself(yama: Yama, attacker: Attacker, *, declares: bool) -> tuple[str, list[int]]:
    """What comes of it when a program of the user asks for its own checkpoint, and whom it has declared."""
    done = subprocess.run([sys.executable, '-c', ITSELF, str(attacker.uid), attacker.address,
                           yama.home if declares else ''], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    outcome, declared = json.loads(done.stdout)
    return outcome, declared


async def test_a_program_declares_its_tracer(yama: Yama, daemon: Served, attacker: Attacker) -> None:
    outcome, declared = checkpoint_itself(yama, attacker, declares=True)
    assert outcome == 'checkpointed'
    assert declared[1:] == [daemon.pid, 0], 'whom it has declared is forgotten'


async def test_one_that_does_not_is_refused(yama: Yama, daemon: Served, attacker: Attacker) -> None:
    outcome, _ = checkpoint_itself(yama, attacker, declares=False)
    assert 'ptrace_scope=1' in outcome
