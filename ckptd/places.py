# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories of a daemon: the system's (file-hierarchy(7)) or a user's (XDG base directories)."""

import os
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import CkptError, NotSupported


@dataclass(frozen=True, slots=True)
class Places:
    """The directories of a daemon."""
    spool: Path      # images
    runtime: Path    # the freeze journal; a reboot clears it, and every freeze with it

    @classmethod
    def of(cls, system: bool, runtime: Path | None = None) -> 'Places':
        """Return the default directories. `runtime`, if given, replaces the default one.

        NotSupported for a user with neither `runtime` nor $XDG_RUNTIME_DIR.
        """
        if system:
            return cls(Path('/var/spool/ckptd'), runtime or Path('/run/ckptd'))
        state = Path(os.environ.get('XDG_STATE_HOME') or Path.home() / '.local/state')
        return cls(state / 'ckptd', runtime or _user_runtime() / 'ckptd')


def _user_runtime() -> Path:
    given = os.environ.get('XDG_RUNTIME_DIR')
    if given:
        return Path(given)
    # In containers and under cron no session manager sets the variable. Use the directory that one would have made.
    usual = Path(f'/run/user/{os.getuid()}')
    if usual.is_dir():
        return usual
    raise NotSupported('no directory for run-time state: XDG_RUNTIME_DIR is not set',
                       resource='XDG_RUNTIME_DIR', hint='set it, or choose a directory with --runtime DIR')


def prepare_runtime(directory: Path) -> None:
    """Make the runtime directory (0700). ckptd thaws what the journal names, so no other user may write it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = directory.stat()
    except OSError as error:
        raise CkptError(f'runtime directory {directory}: {error.strerror}', errno=error.errno,
                        resource=str(directory), hint='choose one that you may write, with --runtime DIR') from error
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise CkptError(f'runtime directory {directory} is writable by other users', resource=str(directory),
                        hint=f'chown {os.geteuid()} {directory}; chmod 700 {directory}')
