# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real buses and daemons for tests: a dbus-daemon on a socket of its own, a ckptd with its own, busctl to talk."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
  </policy>
</busconfig>
"""
ROOT = Path(__file__).parents[2]


def read_line(fd: int, timeout: float) -> str:
    """One line from a pipe or, at its end or after the timeout, what came until then."""
    deadline, line = time.monotonic() + timeout, b''
    while not line.endswith(b'\n'):
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            break
        byte = os.read(fd, 1)
        if not byte:
            break
        line += byte
    return line.decode()


def terminate(process: 'subprocess.Popen[bytes]', timeout: float = 15) -> int:
    """SIGTERM, wait; SIGKILL and an error when it does not obey. Returns the exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f'{process.args!r} did not end within {timeout} s of SIGTERM') from None


def family(pid: int) -> list[int]:
    """A daemon's spawner, and workers. One that ends meanwhile has none."""
    try:
        children = [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [one for child in children for one in family(child)]


class PrivateBus:
    """A dbus-daemon that anybody of this machine may connect to; `address` is where."""
    config = CONFIG

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = ''
        # a socket's path has at most 107 bytes and pytest's directories are longer than that can be
        self._home = Path(tempfile.mkdtemp(prefix='ckptd-bus-'))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def command(self, config: Path) -> list[str | Path]:
        return ['dbus-daemon', f'--config-file={config}', '--nofork', '--nopidfile', '--print-address=1']

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def __enter__(self) -> Self:
        self._home.chmod(0o711)
        config = self._home / 'bus.conf'
        config.write_text(self.config.format(socket=self._home / 'socket'))
        self._process = subprocess.Popen(self.command(config), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                         env=self.environment())
        assert self._process.stdout is not None
        self.address = read_line(self._process.stdout.fileno(), 10).strip()
        self._process.stdout.close()
        assert self.address, 'dbus-daemon did not start'
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            terminate(self._process)
        shutil.rmtree(self._home)


class Daemon:
    """A running ckptd. `address` is its private bus, `log` what it wrote to stderr so far."""
    module = 'ckptd.daemon'

    def __init__(self, directory: Path, spool: Path, options: tuple[str, ...] = (),
                 env: dict[str, str] | None = None) -> None:
        self.spool, self.runtime = spool, directory / 'runtime'
        self.address = ''
        self._options, self._env = options, env or {}
        self._log = directory / f'ckptd.{len(list(directory.glob("ckptd.*.log")))}.log'
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def process(self) -> 'subprocess.Popen[bytes]':
        assert self._process is not None, 'the daemon was not started'
        return self._process

    @property
    def log(self) -> str:
        return self._log.read_text(errors='replace')

    def start(self) -> Self:
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        with self._log.open('wb') as log:
            self._process = subprocess.Popen(
                [sys.executable, '-m', self.module, '--private', '--spool', str(self.spool),
                 '--runtime', str(self.runtime), *self._options],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, env={**os.environ, **self._env})
        assert self.process.stdout is not None
        line = read_line(self.process.stdout.fileno(), 20)
        if not line.startswith('DBUS_ADDRESS='):
            self.stop()
            raise AssertionError(f'ckptd said {line!r} and:\n{self.log}')
        self.address = line.removeprefix('DBUS_ADDRESS=').strip()
        return self

    def stop(self) -> int:
        """Ask it to end and wait; the exit status."""
        if self._process is None:
            return 0
        if self._process.stdout is not None:
            self._process.stdout.close()
        return terminate(self._process)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = self.stop()
        if kind is not None:
            print(self.log, file=sys.stderr)
        elif status not in (0, -signal.SIGKILL):
            raise AssertionError(f'ckptd ended with {status}:\n{self.log}')

    def busctl(self, *args: str, timeout: float = 60) -> 'subprocess.CompletedProcess[str]':
        """busctl on the daemon's bus; the caller looks at the exit status."""
        return subprocess.run(['busctl', f'--address={self.address}', *args], capture_output=True, text=True,
                              timeout=timeout, check=False)

    def call(self, method: str, signature: str = '', *args: str) -> Any:
        """Call a method of the Manager by busctl; the value it answers, busctl's JSON undone one level."""
        done = self.busctl('--json=short', 'call', 'org.ckptd1', '/org/ckptd1', 'org.ckptd1.Manager', method,
                           *((signature, *args) if signature else ()))
        assert done.returncode == 0, f'{method}: {done.stderr}\n{self.log}'
        return json.loads(done.stdout)['data'] if done.stdout.strip() else None


class Served(Daemon):
    """A running ckptd on a bus that is there already. module: the program, for one whose workers play scenes."""

    def __init__(self, bus: str, directory: Path, spool: Path, options: tuple[str, ...] = (),
                 env: dict[str, str] | None = None, module: str = Daemon.module) -> None:
        super().__init__(directory, spool, options, env)
        self.address, self.module = bus, module

    def start(self) -> Self:
        """Until it says READY=1, as a service manager would be told."""
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        name = f'@{self.runtime}'[-100:].replace('@', '').replace('/', '_')     # of 107 bytes
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, self._log.open('wb') as log:
            manager.bind(f'\0{name}')
            manager.settimeout(20)
            self._process = subprocess.Popen(
                [sys.executable, '-m', self.module, '--address', self.address, '--spool', str(self.spool),
                 '--runtime', str(self.runtime), *self._options],
                stdin=subprocess.DEVNULL, stderr=log, cwd=ROOT,
                env={**os.environ, **self._env, 'NOTIFY_SOCKET': f'@{name}'})
            try:
                assert manager.recv(1000).startswith(b'READY=1')
            except TimeoutError:
                self.stop()
                raise AssertionError(f'ckptd is not ready:\n{self.log}') from None
        return self
