# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private dbus-daemon on a socket that no other user can reach.

    $TMPDIR/ckptd-bus-XXXXXXXX/     0700
        lock                        flock held while this process or its bus lives
        bus.conf
        log                         output of dbus-daemon
        bus                         the socket
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckptd.errors import NotSupported, Unavailable
from ckptd.kernel.prctl import PR_SET_PDEATHSIG, prctl
from ckptd.notify import without_service_manager

PREFIX: Final = 'ckptd-bus-'
START_TIMEOUT: Final = 10.0
STOP_TIMEOUT: Final = 2.0
SUN_PATH_MAX: Final = 107           # unix(7)

# Type session without rules about users: only the uid that the daemon runs as may connect (dbus-daemon(1), <policy>).
# The limits suit one client, one ckptd and a few tools. A message may carry 32 MiB.
CONFIG: Final = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <keep_umask/>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
  </policy>
  <limit name="max_completed_connections">256</limit>
  <limit name="max_message_size">67108864</limit>
  <limit name="max_message_unix_fds">16</limit>
  <limit name="max_incoming_unix_fds">64</limit>
  <limit name="max_outgoing_unix_fds">256</limit>
</busconfig>
"""


@dataclass(frozen=True, slots=True)
class PrivateBus:
    """A running private bus."""
    address: str    # address for clients
    pid: int        # pid of the dbus-daemon, which must not be in a tree that is frozen


@contextlib.asynccontextmanager
async def private_bus() -> AsyncIterator[PrivateBus]:
    """Run a dbus-daemon while the context lasts. NotSupported if it is not installed, Unavailable if it fails."""
    remove_stale(Path(tempfile.gettempdir()))
    with _directory() as (home, lock):
        process, reader = _start(home, lock)
        try:
            yield PrivateBus(await _address(reader, home), process.pid)
        finally:
            await _stop(process)


def remove_stale(parent: Path) -> list[Path]:
    """Remove the directories of private buses whose processes were killed. Only these processes held the locks."""
    removed = []
    for path in parent.glob(PREFIX + '*'):
        # another user's directory, one removed meanwhile, or one whose lock is held
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid():
                _remove_if_free(path)
                removed.append(path)
    return removed


def _remove_if_free(path: Path) -> None:
    fd = os.open(path / 'lock', os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _directory() -> Iterator[tuple[Path, int]]:
    """Make a directory and its lock. Both are removed afterwards."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > SUN_PATH_MAX - 40:
        parent = '/tmp'
    home = Path(tempfile.mkdtemp(prefix='.' + PREFIX, dir=parent))
    lock = os.open(home / 'lock', os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Take the final name only now, so that remove_stale never sees the directory without its lock.
        home = home.rename(home.with_name(home.name[1:]))
        yield home, lock
    finally:
        os.close(lock)
        shutil.rmtree(home)


def _start(home: Path, lock: int) -> tuple['subprocess.Popen[bytes]', int]:
    """Return the process and a pipe on which it prints its address."""
    config = home / 'bus.conf'
    config.write_text(CONFIG.format(socket=home / 'bus'))
    reader, writer = os.pipe()
    try:
        with (home / 'log').open('wb') as log:
            process = subprocess.Popen(
                ['dbus-daemon', f'--config-file={config}', '--nofork', '--nopidfile', '--nosyslog',
                 f'--print-address={writer}'],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writer, lock), start_new_session=True,
                preexec_fn=_die_with(os.getpid()), env=without_service_manager(os.environ))
    except FileNotFoundError:
        os.close(reader)
        raise NotSupported('dbus-daemon is not installed', hint='apt-get install dbus-daemon') from None
    finally:
        os.close(writer)
    return process, reader


def _die_with(parent: int) -> Callable[[], None]:
    """Return a function for the child between fork and exec: SIGTERM when the parent's thread ends (prctl(2))."""
    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:      # the parent died before the call above
            os._exit(1)
    return prepare


async def _address(reader: int, home: Path) -> str:
    """Read the address that the process prints once it listens."""
    line = b''
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while not line.endswith(b'\n'):
                await _readable(reader)
                piece = os.read(reader, 4096)
                if not piece:
                    break
                line += piece
    except TimeoutError:
        line = b''
    finally:
        os.close(reader)
    if not line.endswith(b'\n'):
        said = (home / 'log').read_text(errors='backslashreplace').strip()
        raise Unavailable(f'dbus-daemon did not start: {said or "it printed no error"}', hint='')
    return line.decode().strip()


async def _stop(process: 'subprocess.Popen[bytes]') -> None:
    if process.poll() is not None:
        return
    pidfd = os.pidfd_open(process.pid)      # the pid stays the child's until it is waited for
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await _readable(pidfd)
    except TimeoutError:
        process.kill()
    finally:
        os.close(pidfd)
        process.wait()


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)
