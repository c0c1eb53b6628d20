# SPDX-License-Identifier: LGPL-2.1-or-later
"""Actions of a shared table of signal handlers (sigaction(2)). They lead into memory of the program, so they are set
after the shed. The action of SIGTRAP, which stubs use to report, is set last."""

import signal
import struct
from functools import lru_cache

from ckptd.image.records import SigAction, SignalActions
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, Reader, RestoredTask, Scope, Stage
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Out

_SIGNALS = range(1, 65)
_NEVER_HANDLED = (signal.SIGKILL, signal.SIGSTOP)       # rt_sigaction(2) of them is EINVAL
_SIGSET_SIZE = 8
_ACTION = struct.Struct('<4Q')
_DEFAULT = SigAction(0, 0, 0, 0)


class SignalActionsAttribute(Attribute[SignalActions, bytes],
                             name='signal actions', scope=Scope.SIGHAND, stage=Stage.AFTER_RIGHTS):
    support = Support('actions of signals')

    def ask(self, batch: Batch) -> Reader[bytes]:
        out = batch.buffer(len(_SIGNALS) * _ACTION.size)
        for number in _SIGNALS:
            if number not in _NEVER_HANDLED:
                at = Out(out.offset + (number - 1) * _ACTION.size, _ACTION.size)
                batch.call('rt_sigaction', number, 0, at, _SIGSET_SIZE)
        return lambda results: results.data(out)

    def dump(self, of: DumpedTask, answer: bytes) -> Fields:
        return {'actions': _decoded(answer)}

    def restore(self, record: SignalActions, to: RestoredTask) -> None:
        for number, action in _handled(record.actions):
            to.script.call('rt_sigaction', number, action, 0, _SIGSET_SIZE, about=f'signal {number}')


class TrapAction(Attribute[SignalActions, None], name='action of SIGTRAP', scope=Scope.SIGHAND, stage=Stage.FILTERS):
    support = SignalActionsAttribute.support

    def dump(self, of: DumpedTask, answer: None) -> None:
        return None

    def restore(self, record: SignalActions, to: RestoredTask) -> None:
        action = record.actions[signal.SIGTRAP - 1]
        if action != _DEFAULT:
            to.script.call('rt_sigaction', signal.SIGTRAP, action.encode(), 0, _SIGSET_SIZE)


@lru_cache(maxsize=64)      # forked children have their parent's table
def _decoded(data: bytes) -> tuple[SigAction, ...]:
    return tuple(SigAction(*row) for row in _ACTION.iter_unpack(data))


@lru_cache(maxsize=64)
def _handled(actions: tuple[SigAction, ...]) -> list[tuple[int, bytes]]:
    """Return the signal actions that differ from those of a stub."""
    return [(number, action.encode()) for number, action in enumerate(actions, 1)
            if number not in (*_NEVER_HANDLED, signal.SIGTRAP) and action != _DEFAULT]
