# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V semaphores and message queues: outside of the tree, so those that it has used are warnings; those that are
named (--sysv) belong to the image."""

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import Busy, CkptError, Finding, Refused
from ckptd.image.manifest import read_manifest
from ckptd.image.records import SystemVObject
from ckptd.kernel.msg import SystemVMessage, copy_messages, list_queues, msgctl_set, read_queue
from ckptd.kernel.sem import list_sets, read_set, semctl_set
from ckptd.objects.ipc.queues import QueuedMessage
from ckptd.objects.ipc.registry import BY_TYPE
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.lib.brood import libc
from tests.lib.victim import Victim
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, as_user, place_of

pytestmark = [pytest.mark.needs('root', 'ptrace'), pytest.mark.timeout(60)]

IPC_RMID, SEM_UNDO = 0, 0o10000


@pytest.fixture
def semaphores() -> Iterator[int]:
    """The id of a set of two."""
    semid = libc.semget(0, 2, 0o600)
    assert semid >= 0
    yield semid
    libc.semctl(semid, 0, IPC_RMID)


@pytest.fixture
def queue() -> Iterator[int]:
    msqid = libc.msgget(0, 0o600)
    assert msqid >= 0
    yield msqid
    libc.msgctl(msqid, IPC_RMID, None)


def change(semid: int, flags: int = 0, *, by: int = 1) -> None:
    """Add to the second semaphore."""
    assert libc.semop(semid, struct.pack('HhH', 1, by, flags), ctypes.c_size_t(1)) == 0


def send(msqid: int) -> None:
    assert libc.msgsnd(msqid, struct.pack('l4s', 3, b'text'), ctypes.c_size_t(4), 0) == 0


def rows(place: Place, pid: int, **more: object) -> list[Finding]:
    """Warnings of a checkpoint about such objects."""
    found = read_manifest(place.checkpoint(pid, **more)).warnings
    return [row for row in found if row.resource.startswith(('semid', 'msqid', 'SEM_UNDO'))]


def test_what_the_tree_has_used_is_a_warning(place: Place, forked: Callable[..., int], semaphores: int,
                                             queue: int) -> None:
    def work() -> None:
        change(semaphores)
        send(queue)
    pid = forked(work)
    found = rows(place, pid)
    assert [(row.pid, row.resource, row.severity) for row in found] == [
        (pid, f'semid {semaphores}', 'warning'), (pid, f'msqid {queue}', 'warning')]
    assert found[1].reason.endswith('which has 1 messages')


def test_what_others_have_used_is_none(place: Place, forked: Callable[..., int], semaphores: int, queue: int) -> None:
    pid = forked(lambda: change(semaphores, SEM_UNDO))
    change(semaphores)
    send(queue)
    assert rows(place, pid) == []


def test_what_is_undone_is_a_warning_and_no_kill(place: Place, forked: Callable[..., int], semaphores: int) -> None:
    """The kernel would undo it at the kill."""
    pid = forked(lambda: change(semaphores, SEM_UNDO))
    assert [(row.resource, row.severity) for row in rows(place, pid)] == [
        (f'semid {semaphores}', 'warning'), ('SEM_UNDO', 'unrestorable')]
    with pytest.raises(Refused) as refused:
        place.checkpoint(pid, after='kill')
    [row] = [row for row in refused.value.refusals if row.severity == 'refusal']
    assert (row.pid, row.resource) == (pid, 'SEM_UNDO')
    assert f'semaphores {semaphores}' in row.reason
    os.kill(pid, 0)
    place.checkpoint(pid, after='kill', force=True)


def test_a_set_that_may_not_be_read_is_no_error(place: Place, forked: Callable[..., int], semaphores: int) -> None:
    """It was removed, or belongs to another user, while it is looked at: here an id that is gone."""
    pid = forked(lambda: change(semaphores))
    libc.semctl(semaphores, 0, IPC_RMID)
    assert rows(place, pid) == []


# ---------------------------------------------------------------- named

KEY = 0x7e57ab1e
TEXTS = [SystemVMessage(*row)
         for row in ((3, b'first'), (1, b''), (3, bytes(range(256)) * 3), ((1 << 63) - 1, b'last'))]
PROGRAM = """
import ctypes, struct, sys
from victim import ready, wait_for_go
libc = ctypes.CDLL(None, use_errno=True)
semid, msqid = map(int, sys.argv[1:])

def change(number, by):
    assert libc.semop(semid, struct.pack('HhH', number, by, 0o4000), ctypes.c_size_t(1)) == 0

def receive(kind):
    buffer = ctypes.create_string_buffer(4096)
    size = libc.msgrcv(msqid, buffer, ctypes.c_size_t(4000), ctypes.c_long(kind), 0o4000)
    return size, struct.unpack('l', buffer.raw[:8])[0], buffer.raw[8:8 + size]

change(0, 7)
change(1, 32767)
ready()
wait_for_go()
change(0, -7)           # IPC_NOWAIT: not one more, not one less
change(1, -32767)
assert receive(1) == (0, 1, b'')
assert receive(0) == (5, 3, b'first')
assert receive(0)[0] == 768
assert receive(0) == (4, (1 << 63) - 1, b'last')
assert receive(0)[0] == -1
"""


class Named:
    """A set and a queue with one key, both of another user, and a program that uses them."""

    def __init__(self, tmp_path: Path) -> None:
        self.place = Place(tmp_path).make()
        self.semid, self.msqid = libc.semget(KEY, 2, 0o1600), libc.msgget(KEY, 0o1600)
        semctl_set(self.semid, (0, 0), 1234, 4321, 0o640)
        msgctl_set(self.msqid, 1234, 4321, 0o604, 10_000)
        for message in TEXTS:
            text = struct.pack('l', message.type) + message.text
            assert libc.msgsnd(self.msqid, text, ctypes.c_size_t(len(message.text)), 0) == 0
        program = tmp_path / 'program.py'
        program.write_text(PROGRAM)
        self.victim = Victim('program', str(self.semid), str(self.msqid), directory=tmp_path / 'victim',
                             program=program)

    @property
    def names(self) -> list[str]:
        return [f'sem:{self.semid}', f'msg:{self.msqid}']

    @property
    def state(self) -> object:
        return read_set(self.semid)[0], read_queue(self.msqid)[0], list(copy_messages(self.msqid))

    def killed(self) -> Path:
        image = self.place.checkpoint(self.victim.pid, forked=True, after='kill', sysv=self.names)
        assert rows_of(image) == []
        self.victim.process.wait()
        settled.reap_orphans()
        return image

    def restored(self, image: Path, **env: str) -> int:
        with DirectWorker(env=env, forked=not env) as worker:
            return int(worker.run(self.place.request(0, operation='restore', image=image.name))['root'])

    def remove(self) -> None:
        libc.semctl(self.semid, 0, IPC_RMID)
        libc.msgctl(self.msqid, IPC_RMID, None)

    @property
    def are_gone(self) -> bool:
        return not {self.semid} & {one.semid for one in list_sets()} | {self.msqid} & {
            one.msqid for one in list_queues()}

    def end(self, root: int) -> None:
        self.victim.go()
        assert os.waitpid(root, 0) == (root, 0), self.victim.output


@pytest.fixture
def named(tmp_path: Path) -> Iterator[Named]:
    one = Named(tmp_path)
    with one.victim:
        yield one
    one.remove()


def rows_of(image: Path) -> list[Finding]:
    return [row for row in read_manifest(image).warnings if row.resource.startswith(('semid', 'msqid'))]


def test_named_objects_are_made_again(named: Named) -> None:
    """With their ids, keys, owners, modes, values and messages, as after a boot; a restart that fails leaves none."""
    before = named.state
    image = named.killed()
    named.remove()
    with pytest.raises(CkptError):
        named.restored(image, CKPTD_FAULT='rebuilt=error:EIO')
    settled.reap_orphans()
    assert named.are_gone
    root = named.restored(image)
    assert named.state == before
    named.end(root)


def test_named_objects_that_live(named: Named) -> None:
    """As they were they are used, and nothing is made; changed ones are refused by name, and stay."""
    image = named.killed()
    change(named.semid, by=-1)
    with pytest.raises(Busy) as refused:
        named.restored(image)
    [row] = refused.value.refusals
    assert (row.errno, row.resource) == ('EBUSY', f'sem:{named.semid}')
    assert row.hint.endswith(f'ipcrm -s {named.semid}')
    change(named.semid)
    send(named.msqid)
    with pytest.raises(Busy, match=f'queue {named.msqid} exists and is not as it was'):
        named.restored(image)
    assert len(list(copy_messages(named.msqid))) == 5
    named.remove()
    other = libc.semget(KEY, 1, 0o1600)
    try:
        with pytest.raises(Busy, match=f'key {KEY:#x} of the set of System V semaphores {named.semid} is that'):
            named.restored(image)
    finally:
        libc.semctl(other, 0, IPC_RMID)
    assert named.are_gone


def test_unchanged_objects_are_used(named: Named) -> None:
    before = named.state
    named.end(named.restored(named.killed()))
    assert named.state != before


@pytest.mark.parametrize(('kind', 'change', 'said'), [
    ('sem', lambda one: replace(one, values=(1, 32768)), '2 semaphores of up to 32768'),
    ('sem', lambda one: replace(one, values=()), '0 semaphores'),
    ('sem', lambda one: replace(one, permissions=replace(one.permissions, mode=0o1777)), 'mode 0o1777'),
    ('msg', lambda one: replace(one, permissions=replace(one.permissions, uid=(1 << 32) - 1)), 'owner 4294967295:4321'),
    ('msg', lambda one: replace(one, messages=(QueuedMessage(0, b''),)), 'a message of an impossible type'),
    ('msg', lambda one: replace(one, messages=(QueuedMessage(1, bytes(1 << 20)),)), 'a message of 1,048,576 bytes')])
def test_an_image_is_nobodys_word(named: Named, kind: str, change: Callable[[Any], Any], said: str) -> None:
    image = named.killed()
    named.remove()
    cls = BY_TYPE[kind].state
    rewrite(image, SystemVObject, lambda one: one if one.type != kind else replace(
        one, data=change(cls.decode(one.data)).encode()))
    with DirectWorker(forked=True) as worker:
        rows = worker.run(named.place.request(0, operation='check-restore', image=image.name))['refusals']
    assert said in rows[0]['reason']
    assert {row['severity'] for row in rows} == {'refusal'}
    with pytest.raises(CkptError):
        named.restored(image)
    assert named.are_gone


def test_names_of_nothing(place: Place, forked: Callable[..., int], semaphores: int, queue: int) -> None:
    pid = forked(lambda: None)
    for name, errno in ((f'sem:{(1 << 31) - 1}', 'ENOENT'), (f'msg:{(1 << 31) - 1}', 'ENOENT')):
        with pytest.raises(Refused) as refused:
            place.checkpoint(pid, forked=True, sysv=[name])
        assert [(row.errno, row.resource) for row in refused.value.refusals] == [(errno, f'sysv {name}')]


def test_a_user_without_the_right_to_choose_ids() -> None:
    """A ckptd of the user's own, whose worker lacks CAP_CHECKPOINT_RESTORE: what lives is used, what is gone is
    refused."""
    def work() -> None:
        place, semid = Place(Path.cwd()).make(), libc.semget(0, 2, 0o600)
        program = Path('program.py').absolute()
        program.write_text('from victim import ready, wait_for_go\nready()\nwait_for_go()\n')
        with Victim('program', directory=place.path / 'victim', program=program) as running:
            image = place.checkpoint(running.pid, forked=True, freeze='ptrace', sysv=[f'sem:{semid}'])
            assert f'sem:{semid}' not in refused_resources(place, image)
            libc.semctl(semid, 0, IPC_RMID)
            assert f'sem:{semid}' in refused_resources(place, image)
            running.finish()

    with place_of(ORDINARY_UID) as home:
        as_user(ORDINARY_UID, home, work)


def refused_resources(place: Place, image: Path) -> set[str]:
    with DirectWorker(forked=True) as worker:
        rows = worker.run(place.request(0, operation='check-restore', image=image.name))['refusals']
    return {row['resource'] for row in rows}
