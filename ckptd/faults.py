# SPDX-License-Identifier: LGPL-2.1-or-later
"""Named fault points, with which tests make an operation fail at a chosen place.

    CKPTD_FAULT="POINT=ACTION[,POINT=ACTION]"      ACTION: kill | pause | error:ERRNO | ask     POINT: or * for any

kill: the worker ends by SIGKILL. pause: the worker stops there until it is killed. If CKPTD_FAULT_FILE (a FIFO) is set,
it first writes POINT to that file. error: OSError with that errno is raised. ask: the worker connects to the
SOCK_SEQPACKET socket CKPTD_FAULT_FILE, sends POINT, and waits for one of the other actions. An empty answer means go
on. An unknown point ends the worker.
"""

import errno
import os
import signal
import socket
import threading

POINTS = frozenset((
    'resolved', 'scanned', 'frozen', 'rescanned', 'seized-one', 'seized', 'issued-again', 'asleep-again',
    'running-remote', 'remote-mapped', 'state-read', 'memory-half', 'memory-read', 'taken-one', 'taken-out',
    'restored', 'released', 'written', 'sealed', 'published'))
IMPORT_POINTS = frozenset(('received', 'verified'))
RESTORE_POINTS = frozenset((
    'planned', 'opened', 'created-one', 'created', 'filled', 'shed', 'rebuilt', 'ready', 'started'))
# Points of the freezer, one before and one after each change to the system: freeze-make, freeze-move-done, undo-freeze
# ...
PREFIXES = ('freeze-', 'let-run-', 'hold-', 'kill-', 'undo-', 'place-', 'name-', 'queue-')
ANY = '*'
_KNOWN = POINTS | IMPORT_POINTS | RESTORE_POINTS


def _plan() -> dict[str, str]:
    plan = {}
    for part in filter(None, os.environ.get('CKPTD_FAULT', '').split(',')):
        point, _, action = part.partition('=')
        if point not in _KNOWN and point != ANY and not point.startswith(PREFIXES):
            raise SystemExit(f'CKPTD_FAULT: no point {point!r}; there are {", ".join(sorted(_KNOWN))}')
        plan[point] = action
    return plan


_PLAN = _plan()


def fault(point: str) -> None:
    """Carry out the action of CKPTD_FAULT for this point. Without one, do nothing."""
    action = _PLAN.get(point, _PLAN.get(ANY, ''))
    if action:
        _act(point, _ask(point) if action == 'ask' else action)


def _act(point: str, action: str) -> None:
    if action == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == 'pause':
        _announce(point)
        threading.Event().wait()
    elif action.startswith('error:'):
        number = getattr(errno, action.removeprefix('error:'))
        raise OSError(number, f'fault at {point}: {os.strerror(number)}')
    elif action:
        raise SystemExit(f'CKPTD_FAULT: no action {action!r}')


def _announce(point: str) -> None:
    path = os.environ.get('CKPTD_FAULT_FILE')
    if path:
        with open(path, 'ab', buffering=0) as file:  # noqa: PTH123
            file.write(f'{point}\n'.encode())


def _ask(point: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.connect(os.environ['CKPTD_FAULT_FILE'])
        asking.send(point.encode())
        return asking.recv(64).decode()
