# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/sysvipc/sem and msg."""

from ckptd.kernel.msg import SystemVQueue, parse_queues
from ckptd.kernel.sem import SemaphoreSet, parse_sets

SEM = b"""       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime
         0          0   600          2     0     0     0     0          0 1795986719
-559038737      32769  1666          3  1000   100  1000   100 1795986800 1795986719
"""
MSG = (b'       key      msqid perms      cbytes       qnum lspid lrpid   uid   gid  cuid  cgid      stime      rtime'
       b'      ctime\n'
       b'        17          4   640          12          3   811     0     0    17     0     0 1795986719          0'
       b' 1795986719\n')


def test_semaphores() -> None:
    assert parse_sets(SEM) == [SemaphoreSet(0, 0, 0o600, 2, 0, 0, 0),
                               SemaphoreSet(32769, 0xDEADBEEF, 0o1666, 3, 1000, 100, 1795986800)]


def test_queues() -> None:
    assert parse_queues(MSG) == [SystemVQueue(4, 17, 0o640, 12, 3, 811, 0, 0, 17)]
