# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl: parse, dispatch, report. Exit statuses are those of ckptd.errors, and 128 + N after signal N."""

import asyncio
import errno
import importlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, cast

from ckptd.cli.arguments import COMMANDS, parse
from ckptd.cli.output import Output
from ckptd.errors import CkptError, PermissionDenied

if TYPE_CHECKING:
    from ckptd.cli.session import Session

Handler = Callable[['Session'], Awaitable[int]]
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)      # all signals that Interrupts of session.py handles
SAME_KEY = 0.3          # seconds
_HINTS = {              # hints for errors of the user's files
    errno.ENOENT: 'check the name; its directory must exist',
    errno.ENOTDIR: 'check the name; one of its parts is not a directory',
    errno.EISDIR: 'give a file in it',
    errno.EACCES: 'choose a file or directory of your own, or run as its owner',
    errno.EPERM: 'choose a file or directory of your own, or run as its owner',
    errno.EROFS: 'choose a place on another file system',
    errno.ENOSPC: 'free some space, or choose a place on another file system',
    errno.EDQUOT: 'free some space, or choose a place on another file system',
    errno.EMFILE: 'raise the limit of open files (ulimit -n)',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')   # type: ignore[union-attr]
    # An error in the command line is reported in the form that it asks for, before it can be parsed.
    command = next((word for word in argv if word in COMMANDS), '')
    output = Output(json='--json' in argv)
    try:
        return _dispatch(argv, output)
    except CkptError as error:
        output.error(error, command)
        return error.exit_status
    except BrokenPipeError:
        # The reader went away (| head). The interpreter flushes at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        failure = _from_os_error(error)
        output.error(failure, command)
        return failure.exit_status


def _dispatch(argv: Sequence[str], output: Output) -> int:
    args = parse(argv)
    output.json, output.legend, output.every = args.json, args.legend, args.all
    from ckptd.cli.session import Session
    module, _, name = COMMANDS[args.command].handler.partition(':')
    handler = cast(Handler, getattr(importlib.import_module(f'ckptd.cli.{module}'), name))
    return asyncio.run(_interruptible(handler, Session(args, output)))


async def _interruptible(handler: Handler, session: 'Session') -> int:
    """Run the handler. Ctrl-C, SIGTERM and SIGHUP cancel it, and its context managers clean up before the process
    ends."""
    task = asyncio.current_task()
    assert task is not None
    received: list[signal.Signals] = []

    loop = asyncio.get_running_loop()
    deaf_until = 0.0

    def interrupt(number: signal.Signals) -> None:
        nonlocal deaf_until
        if session.interrupts.taker is not None and session.interrupts.taker(number):
            return
        # timeout(1) and sudo(8) pass on the SIGINT that the terminal has sent to us as well, so one Ctrl-C arrives
        # twice
        if loop.time() >= deaf_until:
            deaf_until = loop.time() + SAME_KEY
            received.append(number)
            task.cancel()

    for number in INTERRUPTS:
        loop.add_signal_handler(number, interrupt, number)
    try:
        return await handler(session)
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]
    finally:
        # the exit status is decided, and another Ctrl-C must not change it
        for number in INTERRUPTS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def _from_os_error(error: OSError) -> CkptError:
    kind = PermissionDenied if isinstance(error, PermissionError) else CkptError
    where = f'{error.filename}: ' if error.filename is not None else ''
    return kind(f'{where}{error.strerror or error}', errno=error.errno, hint=_HINTS.get(error.errno or 0, ''))


if __name__ == '__main__':
    sys.exit(main())
