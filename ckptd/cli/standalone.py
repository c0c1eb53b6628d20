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
_libc = ctypes.CDLL(None)       # loaded here, and not between fork and exec
KEPT_LINES = 50         # lines of the daemon's log for the message when it does not start


@contextlib.asynccontextmanager
async def private_daemon(spool: str | Path | None) -> AsyncIterator[str]:
    """Start a private bus with ckptd on it and yield its address. Both end with the context.

    The daemon has a session of its own, so Ctrl-C on the terminal goes to the client only, which cancels its job and
    then stops the daemon. The daemon's log is shown if CKPTD_DEBUG is set or if it does not start.
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
        # after a daemon was killed, a grandchild may have the log open for a moment longer
        await asyncio.wait({drain}, timeout=1)
        drain.cancel()


def end_with_parent() -> None:
    """Arrange, in a new child, for SIGTERM when the client is gone, so that nothing stays running even after kill -9.

    The setting is kept across execve(2) (prctl(2)). The client starts processes from one thread, which ends last.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that they can be waited for (PR_SET_CHILD_SUBREAPER of
    prctl(2))."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def daemon_command(spool: str | Path | None) -> list[str]:
    """Return the command line of the daemon. -P: root must not run a directory called ckptd in the current
    directory."""
    directory = ['--spool', str(Path(spool).absolute())] if spool is not None else []
    return [sys.executable, '-P', '-m', 'ckptd.daemon', '--private', *directory, *_runtime()]


def _runtime() -> list[str]:
    """Return options for the directory of the journal, if the daemon would find none.

    In cron, containers and su(1), XDG_RUNTIME_DIR is not set or belongs to another user. All runs use the same name, so
    that each undoes what a killed one left. The daemon accepts the directory only if no other user can write it.
    """
    usual = os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{os.getuid()}'
    if os.geteuid() == 0 or os.access(usual, os.W_OK):
        return []
    return ['--runtime', f'{tempfile.gettempdir()}/ckptd-{os.getuid()}']


def environment() -> dict[str, str]:
    """Return the environment of the daemon. It imports the same ckptd as the client. It gets no variables of the
    service manager, because a unit around us is not the daemon's."""
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
                          hint='set CKPTD_DEBUG=ckptd and look at the log') from None
    if line.startswith(READY):
        return line.removeprefix(READY).decode().strip()
    await asyncio.wait({drain}, timeout=1)
    said = [text for text in log if text.strip()] or ['it printed no error']
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
    """Send SIGTERM and wait, because the daemon first releases what it holds. On a second interrupt, or if the daemon
    hangs, send SIGKILL; its workers then release their trees themselves."""
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
