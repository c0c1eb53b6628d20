# SPDX-License-Identifier: LGPL-2.1-or-later
"""A throw-away machine with a real systemd as PID 1, over the running system: boots in about a second, leaves nothing.

    with Container(cgroup, directory) as machine:
        machine.run('systemctl', 'is-system-running')

boot.py builds what is inside. The end of the machine is the end of its PID 1: the kernel kills the pid namespace, and
mounts, network and processes go with it.
"""

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Self

from tests.lib.bus import terminate
from tests.lib.settled import remove_cgroup
from tests.system.boot import Spec

ROOT = Path(__file__).parents[2]
BOOT_TIMEOUT = 60.0
PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'


class Container:
    """One machine. pid is that of its PID 1 as the host sees it.

    cgroup: a directory of cgroup2 that may be made below (the machine's root cgroup is made there).
    directory: where its files of the host's side lie. stage, files, binds: see boot.Spec.
    """

    def __init__(self, cgroup: Path, directory: Path, *, stage: Path | None = None, files: dict[str, str] | None = None,
                 binds: tuple[Path, ...] = ()) -> None:
        self.pid = 0
        self._cgroup = cgroup / f'ckptd-machine-{os.getpid()}'
        self._directory = directory
        self._spec = Spec(name='machine', cgroup=str(self._cgroup / 'machine'), notify='', files=files or {},
                          stage=str(stage) if stage else '', binds=[str(path) for path in binds])
        self._unshare: subprocess.Popen[bytes] | None = None

    @property
    def console(self) -> str:
        """What PID 1 said."""
        return (self._directory / 'console').read_text(errors='replace')

    def __enter__(self) -> Self:
        for name in ('machine', 'machine/visitors'):
            (self._cgroup / name).mkdir(parents=True, exist_ok=True)
        try:
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _boot(self) -> None:
        # a socket's path has at most 107 bytes
        with tempfile.TemporaryDirectory(prefix='ckptd-machine-') as short, \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(f'{short}/notify')
            spec = self._directory / 'spec.json'
            spec.write_text(json.dumps({**asdict(self._spec), 'notify': f'{short}/notify'}))
            with (self._directory / 'console').open('wb') as console:
                self._unshare = subprocess.Popen(
                    ['unshare', '--mount', '--uts', '--ipc', '--pid', '--net', '--fork', '--kill-child=SIGKILL',
                     '--propagation', 'private', '--', sys.executable, '-m', 'tests.system.boot', str(spec)],
                    cwd=ROOT, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
            self._await_ready(notify)
        self.pid = int(Path(f'/proc/{self._unshare.pid}/task/{self._unshare.pid}/children').read_text())

    def _await_ready(self, notify: socket.socket) -> None:
        """systemd reports READY=1 once its default target is reached (sd_notify(3), as to a container manager)."""
        assert self._unshare is not None
        died = os.pidfd_open(self._unshare.pid)
        try:
            deadline = time.monotonic() + BOOT_TIMEOUT
            while (left := deadline - time.monotonic()) > 0:
                ready = select.select([notify, died], [], [], left)[0]
                if died in ready:
                    raise AssertionError(f'the machine died while it booted:\n{self.console}')
                if notify in ready and b'READY=1' in notify.recv(4096).split(b'\n'):
                    return
            raise AssertionError(f'the machine did not come up within {BOOT_TIMEOUT:.0f} s:\n{self.console}')
        finally:
            os.close(died)

    def __exit__(self, *_: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.pid = 0
        if self._unshare is not None:
            terminate(self._unshare)
        remove_cgroup(self._cgroup)

    def run(self, *command: str, check: bool = True, timeout: float = 60,
            user: str | None = None) -> 'subprocess.CompletedProcess[str]':
        """Run a command inside, in a cgroup beside the units, as a visitor by ssh would be."""
        visitors = self._cgroup / 'machine/visitors/cgroup.procs'
        become = ['runuser', '-u', user, '--'] if user else []
        done = subprocess.run(
            ['nsenter', '--target', str(self.pid), '--all', '--', *become, *command], capture_output=True, text=True,
            timeout=timeout, check=False, stdin=subprocess.DEVNULL, env={'PATH': PATH, 'LANG': 'C.UTF-8'},
            preexec_fn=lambda: visitors.write_text('0') and None)
        if check and done.returncode:
            raise AssertionError(f'{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}'
                                 f'{self.journal()}')
        return done

    def output(self, *command: str, user: str | None = None) -> str:
        return self.run(*command, user=user).stdout.strip()

    def journal(self, unit: str = '') -> str:
        """The end of the journal, for messages."""
        only = ['--unit', unit] if unit else []
        return self.run('journalctl', '--no-pager', '--lines=60', *only, check=False).stdout

    def property(self, unit: str, name: str) -> str:
        return self.output('systemctl', 'show', '--value', '--property', name, unit)

    def path(self, inside: str) -> Path:
        """A file of the machine, as the host sees it."""
        return Path(f'/proc/{self.pid}/root') / inside.lstrip('/')
