# SPDX-License-Identifier: LGPL-2.1-or-later
"""Named fault points: what the tests use to make an operation die where it hurts.

    CKPTD_FAULT="POINT=ACTION[,POINT=ACTION]"      ACTION: kill | pause | error:ERRNO

kill ends the worker by SIGKILL. pause stops it there until it is killed (it writes POINT to the fd CKPTD_FAULT_FD first,
if that is set). error raises OSError with that errno. A point that no code passes is an error of the test.
"""

import errno
import os
import signal
import threading

POINTS = frozenset((
    'resolved', 'scanned', 'journaled', 'frozen', 'rescanned', 'seized-one', 'seized', 'running-remote', 'remote-mapped',
    'state-read', 'memory-half', 'memory-read', 'before-release', 'released', 'written', 'before-publish', 'published'))


def _plan() -> dict[str, str]:
    plan = {}
    for part in filter(None, os.environ.get('CKPTD_FAULT', '').split(',')):
        point, _, action = part.partition('=')
        if point not in POINTS:
            raise SystemExit(f'CKPTD_FAULT: no point {point!r}; there are {", ".join(sorted(POINTS))}')
        plan[point] = action
    return plan


_PLAN = _plan()


def fault(point: str) -> None:
    """Do what CKPTD_FAULT says for this point; nothing in normal life."""
    action = _PLAN.get(point)
    if action is None:
        return
    if action == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == 'pause':
        _announce(point)
        threading.Event().wait()
    elif action.startswith('error:'):
        number = getattr(errno, action.removeprefix('error:'))
        raise OSError(number, f'fault at {point}: {os.strerror(number)}')
    else:
        raise SystemExit(f'CKPTD_FAULT: no action {action!r}')


def _announce(point: str) -> None:
    fd = os.environ.get('CKPTD_FAULT_FD')
    if fd:
        os.write(int(fd), f'{point}\n'.encode())
