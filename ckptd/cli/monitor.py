# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl monitor."""

import contextlib
import json
import time
from typing import Any

from ckptd.bus.names import JOB
from ckptd.cli.output import Output
from ckptd.cli.progress import MOVING, PHASES
from ckptd.cli.quantities import format_bytes
from ckptd.cli.session import ReceivedSignal, Session, until_interrupted
from ckptd.errors import CkptError

# names of the arguments of each signal, for --json
ARGUMENTS = {
    'JobNew': ('job', 'path'), 'JobRemoved': ('job', 'path', 'result'), 'ImageAdded': ('image', 'path'),
    'ImageRemoved': ('image', 'path'), 'Progress': ('phase', 'progress', 'bytes_done', 'bytes_total'),
    'PrepareForCheckpoint': ('path', 'start'), 'Restored': ('image', 'tasks'),
    'PropertiesChanged': ('interface', 'changed', 'invalidated'), 'InterfacesAdded': ('path', 'interfaces'),
    'InterfacesRemoved': ('path', 'interfaces'),
}


async def monitor(session: Session) -> int:
    """Print signals until Ctrl-C, which is its normal end with status 0."""
    words = Words()
    async with session.daemon() as daemon, daemon.signals(follow=True) as signals:
        session.out.note('watching; Ctrl-C ends it', 'dim')
        with until_interrupted():
            async for signal in signals:
                if signal.member == 'JobNew':       # a client that calls a job's object gets its progress signals
                    with contextlib.suppress(CkptError):
                        await daemon.job_properties(str(signal.args[1]))
                _print(session.out, signal, words.of(signal))
    return 0


def as_document(signal: ReceivedSignal) -> dict[str, Any]:
    """Convert a signal to an object: its origin, and its arguments by name."""
    names = ARGUMENTS.get(signal.member, ())
    if len(names) == len(signal.args):
        arguments: Any = dict(zip(names, signal.args, strict=True))
    else:
        arguments = list(signal.args)
    return {'time': time.time_ns() // 1000, 'signal': signal.member, 'interface': signal.interface,
            'object': signal.path, 'arguments': arguments}


class Words:
    """Short descriptions of signals; '' for those that repeat another one in a form for machines.

    It remembers the jobs that it has seen, because a Progress signal names its job by path and JobNew has no target.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._request_factory: dict[str, str] = {}

    def of(self, signal: ReceivedSignal) -> str:
        match signal.member, list(signal.args):
            case 'InterfacesAdded', [str(path), {'org.ckptd1.Job': {'Operation': operation, 'Target': target}}]:
                self._request_factory[path] = f'{operation} {target}'.strip()
            case 'JobNew', [int(number), str(path)]:
                self._numbers[path] = number
                return f'job {number}  {self._request_factory.pop(path, "")}'.strip()
            case 'JobRemoved', [int(number), str(path), str(result)]:
                self._numbers.pop(path, None)
                return f'job {number}  {result}'
            case 'Progress', [str(phase), float(progress), int(done), int(total)] if signal.interface == JOB:
                job = self._numbers.get(signal.path, signal.path.rpartition('/')[2])
                volume = f'  {format_bytes(done)} of {format_bytes(total)}' if total and phase in MOVING else ''
                return f'job {job}  {progress * 100:3.0f}%  {PHASES.get(phase, phase)}{volume}'
            case 'ImageAdded' | 'ImageRemoved' | 'Restored', [str(image), *_]:
                return f'image {image}'
            case 'PrepareForCheckpoint', [str(path), bool(start)]:
                return f'job {self._numbers.get(path, path.rpartition("/")[2])}  {"begins" if start else "is over"}'
        return ''


def _print(out: Output, signal: ReceivedSignal, words: str) -> None:
    if out.json:
        print(json.dumps(as_document(signal)), file=out.stdout, flush=True)
    elif words:
        out.line(f'{_clock()} {signal.member:<12} {words}')


def _clock() -> str:
    now = time.time()
    return time.strftime('%H:%M:%S', time.localtime(now)) + f'.{int(now * 1000) % 1000:03d}'
