# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl freeze and ckptctl thaw."""

import asyncio
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ckptd.cli.argument_types import target as as_target
from ckptd.cli.options import request_options
from ckptd.cli.quantities import format_count
from ckptd.cli.session import LONG, DaemonProxy, Session, until_interrupted
from ckptd.errors import InvalidArgument, NoSuchTarget
from ckptd.target import AnyTarget, parse_target


async def freeze(session: Session) -> int:
    """Freeze a tree. The daemon holds it. A private daemon ends with this command, so the command then stays."""
    args, out = session.args, session.out
    async with session.daemon() as daemon:
        tasks = await daemon.manager('Freeze', 'sa{sv}', args.target, request_options(args), seconds=LONG)
        if out.json:
            out.document({'target': args.target, 'tasks': tasks})
        out.line(f'{args.target} is frozen: {format_count(tasks, "task")}.')
        if args.standalone:
            await hold(session, daemon, args.target)
        else:
            out.note(f'"ckptctl thaw {args.target}" lets it run on', 'dim')
    return 0


async def thaw(session: Session) -> int:
    """Thaw a tree that the daemon holds."""
    target = session.args.target
    if session.args.standalone:
        holders = _holders(parse_target(target))
        raise NoSuchTarget(f'{target} is held by {", ".join(holders)}' if holders else
                           f'no ckptctl visible here holds {target}', hint=_how_to_end(holders))
    async with session.daemon() as daemon:
        await daemon.manager('Thaw', 'sa{sv}', target, {})
    if session.out.json:
        session.out.document({'target': target, 'thawed': True})
    session.out.line(f'{target} runs on.')
    return 0


async def hold(session: Session, daemon: DaemonProxy, target: str) -> None:
    """Wait for Ctrl-C or SIGTERM, then thaw."""
    session.out.note(f'holding {target}; Ctrl-C (or kill -INT {os.getpid()}) thaws it')
    with until_interrupted():
        await asyncio.get_running_loop().create_future()
    await daemon.manager('Thaw', 'sa{sv}', target, {})
    session.out.note(f'{target} runs on')


def _holders(target: AnyTarget) -> list[str]:
    """List commands that hold this target in the foreground, such as 'ckptctl[123]'."""
    import psutil
    found = []
    for process in psutil.process_iter(['cmdline']):
        words = process.info['cmdline'] or []
        ours = any(Path(word).name in ('ckptctl', 'ckptd.cli') for word in words[:4])
        if ours and '--standalone' in words and process.pid != os.getpid() and _names(words, target):
            found.append(f'ckptctl[{process.pid}]')
    return found


def _names(words: Iterable[str], target: AnyTarget) -> bool:
    for word in words:
        with suppress(InvalidArgument):
            if parse_target(as_target(word)) == target:
                return True
    return False


def _how_to_end(holders: list[str]) -> str:
    if not holders:
        return 'a private daemon holds only trees that its own command froze: leave out --standalone'
    pids = ' '.join(holder[len('ckptctl['):-1] for holder in holders)
    return f'press Ctrl-C in its terminal, or run: kill -INT {pids}'
