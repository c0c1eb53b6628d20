# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V objects of a user's tree that are named (--sysv), through root's daemon."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ckptd.errors import CkptError
from ckptd.kernel.msg import SystemVMessage, copy_messages, msgctl_remove, read_queue, send_message
from ckptd.kernel.sem import read_set, semctl_remove, semget_at
from tests.lib.brood import libc
from tests.lib.bus import Served
from tests.security.attacker import Attacker

PROGRAM = """
semid, msqid = {}, {}
assert libc.semop(semid, struct.pack('HhH', 0, 5, 0), ctypes.c_size_t(1)) == 0
ready()
wait_for_go()
buffer = ctypes.create_string_buffer(100)
size = libc.msgrcv(msqid, buffer, ctypes.c_size_t(90), ctypes.c_long(0), 0o4000)
say((libc.semctl(semid, 0, 12), buffer.raw[8:8 + size].decode()))
"""


@contextmanager
def objects_of(user: Attacker) -> Iterator[tuple[int, int]]:
    """A set and a queue that a user has made."""
    semid, msqid = user.do(lambda: (libc.semget(0, 1, 0o1600), libc.msgget(0, 0o1600)))
    try:
        user.do(lambda: send_message(msqid, SystemVMessage(7, b'text')))
        yield semid, msqid
    finally:
        semctl_remove(semid)
        msgctl_remove(msqid)


def test_a_user_gets_them_back(served: Served, attacker: Attacker) -> None:
    with objects_of(attacker) as (semid, msqid):
        program = attacker.start(PROGRAM.format(semid, msqid))
        before = read_set(semid), read_queue(msqid), list(copy_messages(msqid))
        image = attacker.checkpoint(program, sysv=[str(semid), f'msg:{msqid}'])
        semctl_remove(semid)
        msgctl_remove(msqid)
        back = attacker.restore(image)
        assert back.root == program.pid, back.words
        assert (read_set(semid), read_queue(msqid), list(copy_messages(msqid))) == before
        assert program.ask() == "(5, 'text')"


def test_those_of_another_user(served: Served, attacker: Attacker, other: Attacker) -> None:
    """They are not read; and a restore takes no id from them, and makes nothing that the kernel refuses to the user."""
    with objects_of(other) as (semid, msqid):
        program = attacker.start(PROGRAM.format(0, 0).replace('assert', '#').replace('say(', 'say(0) #'))
        for name in (f'sem:{semid}', f'msg:{msqid}'):
            with pytest.raises(CkptError, match=r'cannot be read: .*Permission denied'):
                attacker.checkpoint(program, sysv=[name])
    with objects_of(attacker) as (semid, msqid):
        image = attacker.checkpoint(program, sysv=[f'sem:{semid}', f'msg:{msqid}'])
        semctl_remove(semid)
        semget_at(semid, 0, 1)
        words = '; '.join(f'{row.errno} {row.resource}' for row in attacker.check_restore(image))
        assert words == f'EACCES sem:{semid}'
