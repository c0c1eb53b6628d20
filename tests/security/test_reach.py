# SPDX-License-Identifier: LGPL-2.1-or-later
"""User memory that steers a stub, and memory of a stub that its user gets at: not before it has shed its rights."""

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.kernel.kcmp import KCMP_VM, kcmp
from tests.lib.bus import Served
from tests.lib.stepping import at_each_call
from tests.lib.victim import VICTIMS, build
from tests.security.attacker import Attacker, Program, may_write, standing, status, tracees_of
from tests.worker.faulty import Gate

# ---------------------------------------------------------------- struct rseq in shared memory

RSEQ_CS, DESCRIPTOR = 8, 0x10000020      # tests/security/rseq.c


@pytest.fixture
def restartable(attacker: Attacker) -> Program:
    """A process whose struct rseq is in a file of the user's."""
    program = attacker.home.parent / 'rseq'
    subprocess.run(['gcc', '-O1', '-static', '-no-pie', '-D_GNU_SOURCE', f'-I{VICTIMS}',
                    f'-DPROOF="{attacker.home}/proof"', '-o', program, Path(__file__).with_name('rseq.c')], check=True)
    # the C library registers one of its own otherwise, and a thread has one only
    return attacker.start('', argv=(program,), env={'GLIBC_TUNABLES': 'glibc.pthread.rseq=0'})


def write_for_ever(path: Path, begun: int) -> None:
    """Send whoever has registered it to the handler. The kernel clears the word when it does not apply."""
    with path.open('r+b') as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as page:
        struct.pack_into('<Q', page, RSEQ_CS, DESCRIPTOR)
        os.write(begun, b'!')
        while True:
            struct.pack_into('<Q', page, RSEQ_CS, DESCRIPTOR)


@contextmanager
def written_for_ever(attacker: Attacker, path: Path) -> Iterator[None]:
    """Have the user do that meanwhile."""
    begun, theirs = os.pipe()
    with attacker.begin(lambda: write_for_ever(path, theirs)):
        os.close(theirs)
        with os.fdopen(begun, 'rb') as pipe:
            assert pipe.read(1) == b'!'
        yield


@pytest.mark.needs('gcc')
async def test_no_restartable_sequence_of_a_privileged_stub(serve: Callable[..., Served], attacker: Attacker,
                                                            gate: Gate, restartable: Program) -> None:
    """The kernel sends a task to an address that it finds in memory of the user's, whatever the task is by then."""
    serve(env=gate.environment)
    shared, proof = restartable.directory / 'shared', attacker.home / 'proof'

    def write(point: str, pid: int) -> None:
        # what another process writes all the time may come too late on a busy machine; this comes at every fault point
        with shared.open('r+b') as file:
            os.pwrite(file.fileno(), struct.pack('<Q', DESCRIPTOR), RSEQ_CS)

    async with gate.open():
        image = await attacker.checkpointing(restartable)
        restartable.wait_dead()
        gate.look = write
        with written_for_ever(attacker, shared):
            await attacker.restoring(image, changed_files='accept')
    assert 'filled' in gate.passed
    if proof.exists():
        assert proof.stat().st_uid == attacker.uid
        assert proof.read_bytes() == bytes(24)      # struct __user_cap_data_struct, all sets empty


# ---------------------------------------------------------------- memory of a stub, by another thread of it

THREADS = """
import threading
for _ in range(2):
    threading.Thread(target=time.sleep, args=(1000,)).start()
rest()
"""


class Prober:
    """A process of the user's that tries to get at the memory of tasks, without stopping them."""

    def __init__(self, attacker: Attacker) -> None:
        reader, self._orders = os.pipe()
        self._answers, writer = os.pipe()
        self._call = attacker.begin(lambda: self._serve(reader, writer))
        os.close(reader)
        os.close(writer)

    def _serve(self, orders: int, answers: int) -> None:
        os.close(self._orders)
        while order := os.read(orders, 4096):
            os.write(answers, b'1' if any(map(may_write, order.split())) else b'0')

    def reaches(self, tasks: list[tuple[int, int]]) -> bool:
        """Whether the user may write to the memory of one of them."""
        os.write(self._orders, b' '.join(b'%d/task/%d' % task for task in tasks))
        return os.read(self._answers, 1) == b'1'

    def close(self) -> None:
        os.close(self._orders)
        os.close(self._answers)
        self._call.result()


@pytest.fixture
def prober(attacker: Attacker) -> Iterator[Prober]:
    prober = Prober(attacker)
    yield prober
    prober.close()


def address_spaces(tasks: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The tasks, those together that have one memory."""
    spaces: list[list[tuple[int, int]]] = []
    for task in tasks:
        same = [space for space in spaces if kcmp(space[0][1], task[1], KCMP_VM) == 0]
        (same[0] if same else spaces.append([]) or spaces[-1]).append(task)
    return spaces


def privileges(task: tuple[int, int], uid: int) -> str:
    """What a task has that is not its user's; '' for nothing, or if it is gone."""
    try:
        rows = status(*task)
    except (FileNotFoundError, ProcessLookupError):
        return ''
    ids = set(rows['Uid'].split()) - {str(uid)}
    sets = {name: rows[name] for name in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb') if int(rows[name], 16)}
    return f'task {task[1]}: uids {ids}, {sets}' if ids or sets else ''


@pytest.mark.needs('gcc')
@pytest.mark.parametrize('name', ['threads', 'headless', 'sharing'])
async def test_no_way_into_a_stub_by_what_shares_its_memory(serve: Callable[..., Served], attacker: Attacker,
                                                            gate: Gate, prober: Prober, name: str) -> None:
    """Whoever may write to the memory of one task may do whatever another task with the same memory may do.

    Threads; a thread whose leader has ended; processes by CLONE_VM.
    """
    serve(env={**gate.environment, 'CKPTD_FAULT': 'filled=ask'})
    argv = () if name == 'threads' else (shutil.copy(build(name), attacker.home.parent / name),)
    program = attacker.start(THREADS, argv=argv)
    image = attacker.checkpoint(program)
    found: set[str] = set()
    with attacker.restoring(image) as call:
        with await standing(gate, 'filled', call) as stands:
            worker = int(status(program.pid)['TracerPid'])
            shared = [tasks for tasks in address_spaces(tracees_of(worker)) if len(tasks) > 1]
            assert shared

            def look() -> None:
                for tasks in shared:
                    if prober.reaches(tasks):
                        # asked after it: a task may have less than a moment ago, and never more
                        found.update(filter(None, (privileges(task, attacker.uid) for task in tasks)))

            assert at_each_call(worker, look, stands.answer)
        outcome = await call
    assert not found
    assert outcome.root, outcome.words
    if argv:
        program.go()        # to check itself, and end
        assert program.ended() == 0, program.output
