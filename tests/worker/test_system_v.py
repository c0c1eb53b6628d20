# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V semaphores and message queues: outside of the tree, so those that it has used are warnings."""

import ctypes
import os
import struct
from collections.abc import Callable, Iterator

import pytest

from ckptd.errors import Finding, Refused
from ckptd.image.manifest import read_manifest
from tests.lib.brood import libc
from tests.worker.driver import Place

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


def change(semid: int, flags: int = 0) -> None:
    """Add 1 to the second semaphore."""
    assert libc.semop(semid, struct.pack('HhH', 1, 1, flags), ctypes.c_size_t(1)) == 0


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
