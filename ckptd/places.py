# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a daemon keeps things: the system's directories (file-hierarchy(7)), or a user's (XDG base directories)."""

import os
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import CkptError, NotSupported


@dataclass(frozen=True, slots=True)
class Places:
    """spool: images. runtime: the freeze journal; it goes when the machine reboots, as every freeze does."""
    spool: Path
    runtime: Path

    @classmethod
    def of(cls, system: bool, runtime: Path | None = None) -> 'Places':
        """runtime: the one to use instead. NotSupported for a user without that and without $XDG_RUNTIME_DIR."""
        if system:
            return cls(Path('/var/spool/ckptd'), runtime or Path('/run/ckptd'))
        state = Path(os.environ.get('XDG_STATE_HOME') or Path.home() / '.local/state')
        return cls(state / 'ckptd', runtime or _user_runtime() / 'ckptd')


def _user_runtime() -> Path:
    given = os.environ.get('XDG_RUNTIME_DIR')
    if given:
        return Path(given)
    # where no session manager made one (containers, cron), the directory that it would have made
    usual = Path(f'/run/user/{os.getuid()}')
    if usual.is_dir():
        return usual
    raise NotSupported('there is no directory for run-time state: XDG_RUNTIME_DIR is not set',
                       resource='XDG_RUNTIME_DIR', hint='set it, or name a directory of yours with --runtime DIR')


def prepare_runtime(directory: Path) -> None:
    """Make the runtime directory (0700). What the journal names is thawed, so nobody else may write it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = directory.stat()
    except OSError as error:
        raise CkptError(f'runtime directory {directory}: {error.strerror}', errno=error.errno,
                        resource=str(directory), hint='name one that you may write with --runtime DIR') from error
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise CkptError(f'runtime directory {directory} can be written by others', resource=str(directory),
                        hint=f'chown {os.geteuid()} {directory}; chmod 700 {directory}')
