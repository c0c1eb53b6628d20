# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl monitor."""

import json
import time
from typing import Any

from ckptd.cli.output import Output
from ckptd.cli.progress import PHASES
from ckptd.cli.quantities import format_bytes
from ckptd.cli.session import Session, Signal, until_interrupted

# names of the arguments of each signal, for --json
ARGUMENTS = {
    'JobNew': ('job', 'path'), 'JobRemoved': ('job', 'path', 'result'), 'ImageAdded': ('image', 'path'),
    'ImageRemoved': ('image', 'path'), 'Progress': ('phase', 'progress', 'bytes_done', 'bytes_total'),
    'PropertiesChanged': ('interface', 'changed', 'invalidated'), 'InterfacesAdded': ('path', 'interfaces'),
    'InterfacesRemoved': ('path', 'interfaces'),
}
# said again by JobNew and ImageAdded, in fewer words
MACHINE_ONLY = ('InterfacesAdded', 'InterfacesRemoved', 'PropertiesChanged')


async def monitor(session: Session) -> int:
    """Print signals until Ctrl-C, which ends it as it should: status 0."""
    async with session.daemon() as daemon, daemon.signals() as signals:
        session.out.note('watching; Ctrl-C ends it', 'dim')
        with until_interrupted():
            async for signal in signals:
                _print(session.out, signal)
    return 0


def _print(out: Output, signal: Signal) -> None:
    if out.json:
        print(json.dumps(as_document(signal)), file=out.stdout, flush=True)
    elif signal.member not in MACHINE_ONLY:
        out.line(f'{_clock()} {signal.member:<12} {describe(signal)}')


def as_document(signal: Signal) -> dict[str, Any]:
    """One object per signal: where it came from, and its arguments by name."""
    names = ARGUMENTS.get(signal.member, ())
    if len(names) == len(signal.args):
        arguments: Any = dict(zip(names, signal.args, strict=True))
    else:
        arguments = list(signal.args)
    return {'time': time.time_ns() // 1000, 'signal': signal.member, 'interface': signal.interface,
            'object': signal.path, 'arguments': arguments}


def describe(signal: Signal) -> str:
    """The arguments of a signal in a few words."""
    match signal.member, list(signal.args):
        case 'Progress', [str(phase), float(progress), int(done), int(total)]:
            volume = f', {format_bytes(done)} of {format_bytes(total)}' if total else ''
            return f'job {signal.path.rsplit("/", 1)[-1]}  {progress * 100:3.0f}%  {PHASES.get(phase, phase)}{volume}'
        case 'JobNew', [number, *_]:
            return f'job {number}'
        case 'JobRemoved', [number, _, result]:
            return f'job {number}  {result}'
        case _, [first, *_]:
            return str(first)
    return signal.path


def _clock() -> str:
    now = time.time()
    return time.strftime('%H:%M:%S', time.localtime(now)) + f'.{int(now * 1000) % 1000:03d}'
