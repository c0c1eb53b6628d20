# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bus and a daemon for one command: no service, no configuration, nothing left afterwards."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import ckptd
from ckptd.errors import Unavailable
from ckptd.kernel.prctl import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG
from ckptd.notify import without_service_manager

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0
READY = b'DBUS_ADDRESS='
_libc = ctypes.CDLL(None)       # loaded here: not between fork and exec
KEPT_LINES = 50         # of the daemon's log, for the message when it does not start


@contextlib.asynccontextmanager
async def private_daemon(spool: str | Path | None) -> AsyncIterator[str]:
    """The address of a new private bus with ckptd on it; both end with the context.

    The daemon has a session of its own: Ctrl-C on the terminal is for the client, which cancels its job and then stops
    the daemon in order. Its log is shown with CKPTD_DEBUG set, or when it does not start.
    """
    log: deque[str] = deque(maxlen=KEPT_LINES)
    process = await asyncio.create_subprocess_exec(
        *daemon_command(spool), env=environment(), start_new_session=True, preexec_fn=end_with_parent,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    drain = asyncio.create_task(_drain(process.stderr, log))
    try:
        yield await _address(process, drain, log)
    finally:
        await _stop(process)
        # a grandchild that outlives a killed daemon for a moment has the log open too
        await asyncio.wait({drain}, timeout=1)
        drain.cancel()


def end_with_parent() -> None:
    """In a new child: SIGTERM when the client is gone, for not even kill -9 of it shall leave anything running.

    prctl(2): kept across execve(2). The client has one thread that starts processes, and it ends last.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def adopt_orphans() -> None:
    """What a child of ours leaves when it ends comes to us, to be waited for (PR_SET_CHILD_SUBREAPER of prctl(2))."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def daemon_command(spool: str | Path | None) -> list[str]:
    """-P: a directory called ckptd in the current directory must not be what root runs (Python 3.11)."""
    directory = ['--spool', str(Path(spool).absolute())] if spool is not None else []
    return [sys.executable, '-P', '-m', 'ckptd.daemon', '--private', *directory, *_runtime()]


def _runtime() -> list[str]:
    """Where the daemon would find no directory for its journal: cron, containers and su(1) come without
    XDG_RUNTIME_DIR, or with somebody else's. One name for all runs, so that each undoes what a killed one left; the
    daemon takes it only if nobody else can write it."""
    usual = os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{os.getuid()}'
    if os.geteuid() == 0 or os.access(usual, os.W_OK):
        return []
    return ['--runtime', f'{tempfile.gettempdir()}/ckptd-{os.getuid()}']


def environment() -> dict[str, str]:
    """The daemon is of the same ckptd as the client, from wherever that was imported. It has nothing to say to the
    service manager: the unit, if we are in one, is ours or that of whoever started us."""
    home = str(Path(ckptd.__file__).parent.parent)
    others = [path for path in os.environ.get('PYTHONPATH', '').split(os.pathsep) if path and path != home]
    return {**without_service_manager(os.environ), 'PYTHONPATH': os.pathsep.join([home, *others])}


async def _address(process: asyncio.subprocess.Process, drain: 'asyncio.Task[None]', log: deque[str]) -> str:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT):
            line = await process.stdout.readline()
    except TimeoutError:
        raise Unavailable(f'the private daemon did not start within {START_TIMEOUT:.0f} s',
                          hint='set CKPTD_DEBUG=ckptd and look at what it says') from None
    if line.startswith(READY):
        return line.removeprefix(READY).decode().strip()
    await asyncio.wait({drain}, timeout=1)
    said = [text for text in log if text.strip()] or ['it said nothing']
    status = await process.wait()
    raise Unavailable(f'the private daemon did not start (exit status {status}):\n  ' + '\n  '.join(said),
                      hint='run "ckptctl doctor" to see what is missing')


async def _drain(stream: asyncio.StreamReader | None, log: deque[str]) -> None:
    """Read the log to its end, so that the daemon never waits for a reader."""
    assert stream is not None
    show = bool(os.environ.get('CKPTD_DEBUG'))
    while chunk := await stream.read(1 << 16):
        text = chunk.decode(errors='backslashreplace')
        log.extend(text.splitlines())
        if show:
            sys.stderr.write(text)
            sys.stderr.flush()


async def _stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, then wait: the daemon releases what it holds first. A second interrupt, or a daemon that hangs: SIGKILL,
    upon which its workers release their trees themselves."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.wait()
    except (TimeoutError, asyncio.CancelledError) as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
