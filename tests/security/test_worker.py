# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who works for a user: a process that is the user, with one capability; and what the user may do to it."""

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from ckptd.client.sync import SyncCkptd
from ckptd.errors import CkptError, PermissionDenied
from ckptd.image.manifest import Clocks, read_manifest
from ckptd.image.reader import ImageReader
from ckptd.image.records import SleepLeft
from ckptd.kernel.clone import CLONE_NEWPID
from ckptd.kernel.stat import read_stat
from ckptd.kernel.timens import unshare
from ckptd.kernel.wchan import read_wchan
from ckptd.operation.context import JobContext
from ckptd.protocol.broker_calls import ReadTimers, StopUnit
from ckptd.protocol.channel import Channel
from ckptd.worker.broker.answers import BrokerAnswers
from ckptd.worker.broker.identity import Identity
from tests.lib.bus import Served, family
from tests.programs.conftest import await_that
from tests.security.attacker import (
    PATIENCE,
    Attacker,
    Program,
    is_frozen,
    may_write,
    place_of,
    standing,
    status,
    threads,
    tracees_of,
    unchanged,
)
from tests.worker.driver import Place
from tests.worker.faulty import Gate

CHECKPOINT_RESTORE = 1 << 40        # <linux/capability.h>
SETS = ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')

# three processes, two of them with threads
TREE = """
import threading
begun, begin = os.pipe()
for _ in range(2):
    if not os.fork():
        not_the_one_to_report()
        for _ in range(2):
            threading.Thread(target=time.sleep, args=(1000,)).start()
        os.write(begin, b'!')
        time.sleep(1000)
for _ in range(2):
    os.read(begun, 1)
ready()
while True:
    wait_for_go()
    say('here')
"""


def tree_of(pid: int) -> list[tuple[int, int]]:
    """(pid, tid) of a process and what descends from it."""
    return [(process, tid) for process in (pid, *family(pid)) for tid in threads(process)]


def ids_of(pid: int, tid: int = 0) -> tuple[set[str], set[str]]:
    rows = status(pid, tid)
    return set(rows['Uid'].split()), set(rows['Gid'].split())


def assert_is(user: Attacker, worker: int) -> None:
    """A process is this user with CAP_CHECKPOINT_RESTORE, and the user's other processes do not get at it."""
    rows = status(worker)
    assert ids_of(worker) == ({str(user.uid)}, {str(user.uid)})
    assert set(rows['Groups'].split()) == set(map(str, user.groups))
    assert int(rows['CapEff'], 16) == CHECKPOINT_RESTORE
    assert int(rows['CapPrm'], 16) == CHECKPOINT_RESTORE
    assert not user.do(lambda: may_write(b'%d' % worker))


async def dumped(asker: Attacker, program: Program, gate: Gate, look: Callable[[int], object], **options: Any) -> str:
    """The id of an image of a program, which is dead. look: at the worker, in the middle of its work."""
    with asker.checkpointing(program, **options) as call, await standing(gate, 'memory-half', call) as worker:
        look(worker.pid)
        worker.answer()
        async with gate.open():
            image: str = await call
            await worker.gone()     # it removes the cgroup of the freeze after it has said that it is done
    program.wait_dead()
    return image


# ---------------------------------------------------------------- who is who

async def test_the_worker_is_the_user(serve: Callable[..., Served], attacker: Attacker, gate: Gate) -> None:
    """And the tree that comes back has no capability."""
    serve(env=gate.environment)
    program = attacker.start(TREE)
    before = tree_of(program.pid)
    image = await dumped(attacker, program, gate, lambda worker: assert_is(attacker, worker))
    with attacker.restoring(image) as call, await standing(gate, 'filled', call) as worker:
        assert_is(attacker, int(status(program.pid)['TracerPid']))
        worker.answer()
        async with gate.open():
            outcome = await call
    assert outcome.root, outcome.words
    assert tree_of(program.pid) == before
    for task in before:
        assert {name: int(status(*task)[name], 16) for name in SETS} == dict.fromkeys(SETS, 0)
        assert ids_of(*task) == ({str(attacker.uid)}, {str(attacker.uid)})
    assert program.ask() == 'here'


# ---------------------------------------------------------------- who the stubs are

@pytest.fixture
def root(attacker: Attacker) -> Attacker:
    """The administrator, as one who asks."""
    return Attacker('root', 0, tuple(os.getgroups()), attacker.home, attacker.address)


@pytest.mark.parametrize('asker', ['user', 'root'])
async def test_every_stub_is_the_user(serve: Callable[..., Served], attacker: Attacker, root: Attacker, gate: Gate,
                                      asker: str) -> None:
    """At each moment of a restore of a user's image, whoever asks for it: a stub that is root is one that a mistake
    makes a user's."""
    serve(env=gate.environment)
    program = attacker.start(TREE)
    seen: dict[str, set[tuple[str, int]]] = {}

    def look(point: str, pid: int) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            tracer = int(status(program.pid)['TracerPid'])
            for task in tracees_of(tracer) if tracer else ():
                rows = status(*task)
                beyond = int(rows['CapPrm'], 16) & ~CHECKPOINT_RESTORE
                seen.setdefault(point, set()).update((uid, beyond) for uid in rows['Uid'].split())

    async with gate.open():
        image = await attacker.checkpointing(program)
        program.wait_dead()
        gate.look = look
        outcome = await (attacker if asker == 'user' else root).restoring(image)
    assert outcome.root, outcome.words
    assert {'created', 'filled', 'rebuilt', 'ready'} <= seen.keys()
    assert all(who == {(str(attacker.uid), 0)} for who in seen.values()), seen
    assert program.ask() == 'here'


# ---------------------------------------------------------------- a worker that its user stops

def exit_status(ckptd: SyncCkptd, pid: int, timeout: int) -> int:
    """That of `ckptctl checkpoint PID --timeout`, in microseconds."""
    try:
        ckptd.checkpoint(f'pid:{pid}', timeout=timeout).wait(PATIENCE)
    except CkptError as error:
        return error.exit_status
    return 0


def stands_still(pid: int, home: Path) -> list[str]:
    """What keeps a process from running at home: a tracer, a stop, a freezer."""
    rows, place = status(pid), place_of(pid)
    found = [f'it is traced by {rows["TracerPid"]}'] if int(rows['TracerPid']) else []
    found += [f'it is in state {rows["State"]}'] if rows['State'][0] in 'tT' else []
    found += [f'it is frozen in {place}'] if is_frozen(place) else []
    return found + ([f'it is in {place}'] if place != home else [])


@pytest.mark.needs('cgroup2')
@pytest.mark.parametrize('point', ['seized', 'memory-half'])
async def test_a_worker_that_its_user_has_stopped(serve: Callable[..., Served], attacker: Attacker, gate: Gate,
                                                  point: str) -> None:
    """The tree stands still for as long as the deadline of the job says, and not for as long as the user wants."""
    daemon = serve(env=gate.environment)
    program = attacker.start(TREE)
    home = place_of(program.pid)
    asking = attacker.begin(lambda: attacker.connected(lambda ckptd: exit_status(ckptd, program.pid, 2_000_000)))
    with asking as call, await standing(gate, point, call) as worker:
        assert_is(attacker, worker.pid)
        attacker.do(lambda: os.kill(worker.pid, signal.SIGSTOP))
        worker.answer()
        async with gate.open():
            assert await call == 124
        await worker.gone()
    for pid in (program.pid, *family(program.pid)):
        assert not stands_still(pid, home)
    assert names_in(daemon.runtime / 'freezes') == []
    assert program.ask() == 'here'


# ---------------------------------------------------------------- a worker that its user kills

WRITER = """
os.mkdir('saved')
file = open('saved/passwd', 'wb+')
file.write(b'so far')
file.flush()
rest()
"""


@pytest.fixture
def etc(attacker: Attacker) -> Path:
    """A directory of root's with a file that everybody reads."""
    path = attacker.home.parent / 'etc'
    path.mkdir(mode=0o755)
    (path / 'passwd').write_bytes(b'of root')
    return path


# what the rollback finds of the file; the points that it has passed when its worker is killed
MIDDLES = {
    'kept': (b'another', ('place-keep-file-done',)),
    'rewritten': (b'another', ('place-keep-file-done', 'place-committed')),
    'made': (b'', ('place-make-file-done',)),
}


@pytest.mark.parametrize('swap', [True, False], ids=['swapped', 'control'])
@pytest.mark.parametrize('middle', MIDDLES)
async def test_a_worker_that_its_user_kills_in_a_rollback(serve: Callable[..., Served], attacker: Attacker, gate: Gate,
                                                          etc: Path, middle: str, swap: bool) -> None:
    """What the rollback has done is undone by path, and by then the path leads to root's files."""
    daemon = serve(env=gate.environment)
    program = attacker.start(WRITER)
    saved = program.directory / 'saved'
    async with gate.open():
        image = await attacker.checkpointing(program, save_files=True)
    program.wait_dead()
    found, points = MIDDLES[middle]
    (saved / 'passwd').write_bytes(found) if found else (saved / 'passwd').unlink()
    with unchanged(etc / 'passwd'):
        with attacker.restoring(image, changed_files='rollback') as call:
            for point in points[:-1]:
                with await standing(gate, point, call) as worker:
                    worker.answer()
            with await standing(gate, points[-1], call) as worker:
                assert_is(attacker, worker.pid)
                if swap:
                    attacker.do(lambda: swapped(saved, etc))
                attacker.do(lambda: os.kill(worker.pid, signal.SIGKILL))
                async with gate.open():
                    assert (await call).error is not None
        assert 'Traceback' not in daemon.log, daemon.log
        # what has not been undone by then, the next daemon undoes
        daemon.stop()
        daemon.start()
        async with gate.open():
            await attacker.begin(lambda: attacker.connected(lambda ckptd: ckptd.list_jobs()))
        daemon.stop()
    assert names_in(etc) == ['passwd']
    if not swap:
        assert names_in(saved) == (['passwd'] if found else [])
        assert not found or (saved / 'passwd').read_bytes() == found


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def swapped(directory: Path, link: Path) -> None:
    """Have a path lead elsewhere."""
    directory.rename(directory.with_name('old'))
    directory.symlink_to(link)


# ---------------------------------------------------------------- a tree that is ended

@pytest.mark.needs('cgroup2')
@pytest.mark.parametrize(('dead', 'freeze'), [('worker', 'auto'), ('broker', 'auto'), ('both', 'auto'), ('all', 'auto'),
                                              ('worker', 'ptrace'), ('all', 'ptrace')])
async def test_who_dies_while_it_ends_the_tree(serve: Callable[..., Served], attacker: Attacker, gate: Gate,
                                               dead: str, freeze: str) -> None:
    """The first process of the tree is dead by then: none may stay, and all come back from the image."""
    daemon = serve(env=gate.environment)
    program = attacker.start(TREE)
    tree = tree_of(program.pid)
    with attacker.checkpointing(program, freeze=freeze) as call, await standing(gate, 'kill-one', call) as worker:
        broker = int(status(worker.pid)['PPid'])
        if dead == 'all':
            daemon.process.kill()
            daemon.process.wait()
        if dead != 'broker':
            worker.kill()
            await worker.gone()
        if dead != 'worker':
            os.kill(broker, signal.SIGKILL)
        worker.answer()
        async with gate.open():
            if dead == 'all':
                await asyncio.to_thread(daemon.start)
            with pytest.raises(CkptError):
                await call
            await asyncio.to_thread(await_that, 'all are dead', lambda: not any(is_alive(*task) for task in tree))
    await asyncio.get_running_loop().shutdown_default_executor()
    program.wait_dead()
    assert names_in(daemon.runtime / 'freezes') == []
    async with gate.open():
        [image] = [image.id for image in await attacker.begin(lambda: attacker.connected(SyncCkptd.list_images))]
        outcome = await attacker.restoring(image)
    assert outcome.root, outcome.words
    assert tree_of(program.pid) == tree
    assert program.ask() == 'here'


def is_alive(pid: int, tid: int) -> bool:
    try:
        return read_stat(pid, tid).state not in 'ZX'
    except ProcessLookupError:
        return False


# ---------------------------------------------------------------- clocks

CLOCKS = """
ready()
while True:
    wait_for_go()
    say(f'{time.clock_gettime_ns(time.CLOCK_MONOTONIC)} {time.clock_gettime_ns(time.CLOCK_BOOTTIME)}')
"""
HOUR = 3600 * 10**9
MOMENT = 60 * 10**9     # more than a test takes


@pytest.mark.needs('time-namespaces')
@pytest.mark.parametrize('passed', [HOUR, -HOUR // 1800], ids=['forward', 'back'])
def test_clocks_go_on_after_another_boot(served: Served, attacker: Attacker, passed: int) -> None:
    """The image says that it is of another boot, whose clocks were further, or less far."""
    program = attacker.start(CLOCKS)
    image = attacker.take(program)
    then = image.manifest.clocks.monotonic + passed, image.manifest.clocks.boottime + passed
    image.claim(boot_id='00000000-0000-4000-8000-000000000000', clocks=Clocks(monotonic=then[0], boottime=then[1]))
    outcome = attacker.restore(image)
    assert outcome.root, outcome.words
    for before, now in zip(then, map(int, program.ask().split()), strict=True):
        assert before <= now < before + MOMENT


# ---------------------------------------------------------------- a pid namespace

# the process that is meant is the first of its pid namespace, if there is one
CHILD = """
def child():
    ready()
    while True:
        wait_for_go()
        say(f'{os.getpid()} {os.getppid()} {os.readlink("/proc/self/ns/user")}')

pid = os.fork()
if not pid:
    child()
not_the_one_to_report()
os.waitpid(pid, 0)
"""


def kill_namespace(root: int) -> None:
    """End the process 1 of a pid namespace that is a child of ours, or of which that is the parent."""
    rows = status(root)
    os.kill(root if rows['NSpid'].split()[-1] == '1' else int(rows['PPid']), signal.SIGKILL)


def assert_rightless(pid: int) -> None:
    assert {name: int(status(pid)[name], 16) for name in SETS} == dict.fromkeys(SETS, 0)


def test_a_pid_namespace(served: Served, attacker: Attacker) -> None:
    """The launcher makes it; the tree is in no user namespace, and its init has no right either. What has lived in one
    comes back in one, asked for or not."""
    program = attacker.start(TREE)
    image = attacker.checkpoint(program)
    here = Path('/proc/self/ns/user').readlink()
    for options in ({'new_pidns': True}, {}):
        outcome = attacker.restore(image, **options)
        assert outcome.root, outcome.words
        assert status(outcome.root)['NSpid'].split()[1:] == [str(program.pid)]
        init = int(status(outcome.root)['PPid'])
        assert (status(init)['Name'], status(init)['NSpid'].split()[1:]) == ('ckptd-init', ['1'])
        for pid in (init, *family(init)):
            assert_rightless(pid)
            assert Path(f'/proc/{pid}/ns/user').readlink() == here
            assert ids_of(pid) == ({str(attacker.uid)}, {str(attacker.uid)})
        assert program.ask() == 'here'
        image = attacker.on_bus(lambda ckptd, root=outcome.root: ckptd.checkpoint(
            f'pid:{root}', after='kill').wait(20).image)


def test_an_image_that_hides_its_pid_namespace(served: Served, attacker: Attacker) -> None:
    """The launcher goes by the manifest, and has made none; the worker does not take numbers of this machine's."""
    image = attacker.take(attacker.start(TREE))
    image.change('Namespaces', lambda one: dataclasses.replace(one, namespaces=tuple(
        dataclasses.replace(each, own=0, inode=1) if each.name == 'pid' else each for each in one.namespaces)))
    error = attacker.restore(image).error
    assert error is not None
    [row] = error.refusals
    assert (row.resource, '--new-pidns' in row.hint) == ('namespace pid', True)
    outcome = attacker.restore(image, new_pidns=True)
    assert len(status(outcome.root)['NSpid'].split()) == 2, outcome.words
    kill_namespace(outcome.root)


def test_a_tree_with_an_init_of_its_own(served: Served, attacker: Attacker) -> None:
    attacker.before.append(lambda: unshare(CLONE_NEWPID))
    program = attacker.start(CHILD)
    attacker.before.clear()
    [init] = family(program.pid)
    image = attacker.on_bus(lambda ckptd: ckptd.checkpoint(f'pid:{init}', after='kill').wait(20).image)
    outcome = attacker.restore(image)
    assert outcome.root, outcome.words
    assert status(outcome.root)['NSpid'].split()[1:] == ['1']
    assert_rightless(outcome.root)
    assert program.ask() == f'1 0 {Path("/proc/self/ns/user").readlink()}'
    kill_namespace(outcome.root)


# ---------------------------------------------------------------- timers

NAP = """
ready()
call(35, ctypes.byref((ctypes.c_long * 2)(4567, 0)), None)      # nanosleep(2)
"""


def test_the_end_of_a_sleep_is_known_to_the_nanosecond(served: Served, attacker: Attacker) -> None:
    """Of a call that is going on for the second time, nothing but the list of all timers tells it, which is root's."""
    program = attacker.start(NAP)
    while 'nanosleep' not in read_wchan(program.pid):
        os.sched_yield()
    ends = set()
    for _ in range(3):
        image = attacker.on_bus(lambda ckptd: ckptd.checkpoint(f'pid:{program.pid}').wait(20).image)
        with ImageReader(served.spool / image) as reader:
            [left] = reader.every(SleepLeft)
            assert left.exact
            ends.add(left.left_ns + reader.manifest.clocks.monotonic)
    assert len(ends) == 1, ends


def test_timers_of_others_are_not_told(attacker: Attacker, tmp_path: Path) -> None:
    """A worker may ask about tasks that it traces, and hears of ends that come and go with them."""
    program = attacker.start(NAP)
    job = JobContext(Place(tmp_path).make().request(program.pid), cast(Channel, None))
    with contextlib.closing(BrokerAnswers(job, Identity(attacker.uid, attacker.uid, ()), os.getpid())) as made:
        assert made.answer(ReadTimers()) == ({'ends': []}, [])
        for tid in (1, os.getpid(), program.pid):
            with pytest.raises(PermissionDenied, match='not traced by the worker'):
                made.answer(ReadTimers((tid,)))
        assert made.answer(ReadTimers()) == ({'ends': []}, [])


def test_no_unit_is_stopped_for_a_worker_alone(attacker: Attacker, tmp_path: Path) -> None:
    """The request must be to kill a unit, which polkit has allowed, and there must be an image of it."""
    asked = Place(tmp_path).make().request(attacker.start(NAP).pid)
    for request in (asked, msgspec.structs.replace(asked, after='kill', stop_unit=True)):
        job = JobContext(request, cast(Channel, None))
        with contextlib.closing(BrokerAnswers(job, Identity(attacker.uid, attacker.uid, ()), os.getpid())) as made, \
                pytest.raises(PermissionDenied, match='may not end the tree, or has no image of it yet'):
            made.answer(StopUnit())


# ---------------------------------------------------------------- root's checkpoints

async def test_root_dumps_a_users_tree_by_that_users_rights(serve: Callable[..., Served], attacker: Attacker,
                                                            root: Attacker, gate: Gate) -> None:
    """The image is root's, and the tree comes back from it."""
    daemon = serve(env=gate.environment)
    program = attacker.start(TREE)
    image = await dumped(root, program, gate, lambda worker: assert_is(attacker, worker))
    manifest = read_manifest(daemon.spool / image)
    assert (manifest.owner_uid, manifest.owner_gid) == (0, 0)
    assert {path.stat().st_uid for path in (daemon.spool / image).iterdir()} == {0}
    async with gate.open():
        with pytest.raises(CkptError):
            await attacker.begin(lambda: attacker.connected(lambda ckptd: ckptd.image(image).verify()))
        outcome = await root.restoring(image)
    assert outcome.root == program.pid, outcome.words
    assert program.ask() == 'here'


@pytest.mark.parametrize('why', ['asked for', 'not dumpable'])
async def test_what_root_dumps_itself(serve: Callable[..., Served], attacker: Attacker, root: Attacker, gate: Gate,
                                      why: str) -> None:
    """A tree that the user might not trace has, or had, more than the user's rights."""
    serve(env=gate.environment)
    asked = why == 'asked for'
    program = attacker.start('rest()' if asked else 'libc.prctl(4, 0, 0, 0, 0)\nrest()')      # PR_SET_DUMPABLE
    whose = []
    await dumped(root, program, gate, lambda worker: whose.append(ids_of(worker)), as_root=asked)
    assert whose == [({'0'}, {'0'})]


def test_a_user_does_not_ask_for_the_rights_of_root(served: Served, attacker: Attacker) -> None:
    program = attacker.start(TREE)
    with pytest.raises(PermissionDenied, match=r'needs root.s rights \(org\.ckptd1\.checkpoint'):
        attacker.checkpointing(program, as_root=True).result()


def test_a_refusal_tells_root_of_the_other_way(served: Served, attacker: Attacker, root: Attacker) -> None:
    """What the user may not read is not read for root either, unless root says so."""
    secret = attacker.home / 'secret'
    secret.write_text('of root')
    secret.chmod(0o600)
    source = 'rest()'
    attacker.before.append(lambda: os.dup2(os.open(secret, os.O_RDONLY), 9))
    program = attacker.start(source, inherit=(9,))
    secret.unlink()
    with pytest.raises(CkptError, match='secret') as refused:
        root.checkpointing(program).result()
    assert '--as-root' in (refused.value.hint or '')
    for as_root in (False, True):
        rows = root.on_bus(lambda ckptd, as_root=as_root: ckptd.check(f'pid:{program.pid}', as_root=as_root))
        assert any('secret' in row.reason for row in rows if row.severity == 'refusal') != as_root, rows
    assert root.checkpoint(program, as_root=True)
