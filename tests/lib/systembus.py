# SPDX-License-Identifier: LGPL-2.1-or-later
"""Buses with the policy of a system bus, of either kind, and users on them; what a program says while it runs.

    SystemBus       dbus-daemon
    SystemBroker    dbus-broker under its own launcher, which reads the same configuration

Users who are not of this machine are in the passwd of the mount namespaces of buses and polkitd: dbus-daemon turns away
who has no entry there, polkit's rules have names for users.

Nobody may own a name or call a method but where a file of policy says so: org.freedesktop.PolicyKit1.conf of polkit,
dbus/org.ckptd1.conf of this project.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ckptd.kernel.stat import read_stat
from tests.lib.bus import ROOT, PrivateBus, terminate
from tests.lib.settled import reap_orphans

PATIENCE = 20.0     # seconds for what takes a fraction of one
USERS = {'alice': 61001, 'bob': 61002, 'carol': 61003}

# /usr/share/dbus-1/system.conf without its limits, activation, user and log: the same rules for everybody
CONFIG = f"""<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={{socket}}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Properties"/>
  </policy>
  <include ignore_missing="yes">/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf</include>
  <include>{ROOT}/dbus/org.ckptd1.conf</include>
</busconfig>
"""
PASSWD = """for name in passwd group; do mount --bind "$USERS/$name" "/etc/$name"; done
"""
# the launcher logs to the journal alone, and ends where there is none
JOURNAL = PASSWD + """mount -t tmpfs none /run
mkdir -p /run/systemd/journal
touch /run/systemd/journal/socket
mount --bind "$JOURNAL" /run/systemd/journal/socket
export LISTEN_PID=$$
exec "$@" 3<&0 </dev/null"""


def write_users(directory: Path) -> None:
    """The passwd and group of this machine with USERS."""
    for name, line in (('passwd', '{0}:x:{1}:{1}::/:/bin/sh\n'), ('group', '{0}:x:{1}:\n')):
        ours = ''.join(line.format(user, uid) for user, uid in USERS.items())
        (directory / name).write_text(Path('/etc', name).read_text() + ours)


def in_own_mounts(script: str, *command: str | Path) -> list[str | Path]:
    """A command line in a mount namespace that the script fills; the script ends with exec "$@"."""
    return ['unshare', '--mount', '--propagation=private', '--', 'sh', '-euc', script, 'sh', *command]


class Listener:
    """Collects what read() returns, until b'', in a thread, so that who says it never waits for us."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read, self._text = read, ''
        self._more = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._listen, name='listener')
        self._thread.start()

    @property
    def text(self) -> str:
        with self._more:
            return self._text

    def _listen(self) -> None:
        while data := self._read():
            self._add(data.decode(errors='replace'))
        self._add('', ended=True)

    def _add(self, text: str, *, ended: bool = False) -> None:
        with self._more:
            self._text, self._ended = self._text + text, ended
            self._more.notify_all()

    def wait(self, words: str, times: int = 1) -> None:
        """Until the words have been said so often."""
        with self._more:
            self._more.wait_for(lambda: self._ended or self._text.count(words) >= times, PATIENCE)
            assert self._text.count(words) >= times, f'{words!r} was not said but:\n{self._text}'

    def join(self) -> None:
        self._thread.join(PATIENCE)


class SystemBus(PrivateBus):
    """A dbus-daemon. `address` is where, for everybody."""
    config = CONFIG

    def command(self, config: Path) -> list[str | Path]:
        write_users(self._home)
        return in_own_mounts(PASSWD + 'exec "$@"', *super().command(config))

    def environment(self) -> dict[str, str]:
        return {**os.environ, 'USERS': str(self._home)}


class SystemBroker(SystemBus):
    """A dbus-broker whose launcher is the one of the system, in mounts of its own, with a socket for a journal."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._journal: socket.socket | None = None
        self._listener: Listener | None = None

    def __enter__(self) -> Self:
        self._home.chmod(0o711)
        self.address = f'unix:path={self._home}/socket'
        write_users(self._home)
        (self._home / 'bus.conf').write_text(self.config.format(socket=self._home / 'socket'))
        self._journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._journal.bind(f'{self._home}/journal')
        self._listener = Listener(lambda: self._journal.recv(1 << 16) if self._journal else b'')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f'{self._home}/socket')
            (self._home / 'socket').chmod(0o666)
            listener.listen()
            self._process = subprocess.Popen(
                in_own_mounts(JOURNAL, 'dbus-broker-launch', '--scope=system', f'--config-file={self._home}/bus.conf'),
                stdin=listener, env={**self.environment(), 'LISTEN_FDS': '1', 'JOURNAL': f'{self._home}/journal',
                                     'DBUS_SYSTEM_BUS_ADDRESS': self.address})
        self._listener.wait('MESSAGE=Ready')
        return self

    def __exit__(self, *_: object) -> None:
        assert self._journal is not None
        assert self._listener is not None
        if self._process is not None:
            brokers = [os.pidfd_open(pid) for pid in children_of(self._process.pid)]
            terminate(self._process)
            for broker in brokers:      # it ends after its launcher, and has something to log until then
                select.select([broker], [], [], PATIENCE)
                os.close(broker)
            reap_orphans()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b'', f'{self._home}/journal')
        self._listener.join()
        self._journal.close()
        shutil.rmtree(self._home)


BUSES = {'dbus-daemon': SystemBus, 'dbus-broker': SystemBroker}


@dataclass(frozen=True)
class User:
    """Somebody who is not root on a bus."""
    bus: PrivateBus
    name: str
    uid: int

    def start(self, *command: str, **options: Any) -> 'subprocess.Popen[str]':
        """A program of this user's, in no group but its own."""
        return subprocess.Popen(command, user=self.uid, group=self.uid, extra_groups=[], cwd='/', text=True,
                                env={**os.environ, 'DBUS_SYSTEM_BUS_ADDRESS': self.bus.address},
                                **{'stdin': subprocess.DEVNULL, **options})

    @contextmanager
    def process(self) -> Iterator[int]:
        """The pid of one that sleeps."""
        with self.start('sleep', '1000', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield process.pid
            finally:
                process.kill()

    @contextmanager
    def held(self, *command: str) -> Iterator['Pending']:
        """A program of this user's that waits before its first step: its pid is known before it does anything."""
        # its process stays the same: an agent is registered for a pid and a start time
        with self.start('sh', '-c', 'read go; exec "$@" </dev/null', 'sh', *command, stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                yield Pending(process)
            finally:
                process.kill()

    @contextmanager
    def call(self, *arguments: str, interactive: bool = True) -> Iterator['Pending']:
        """The same for `busctl call`. interactive: the message says that its caller waits for a person to be asked."""
        with self.held('busctl', f'--address={self.bus.address}', '--json=short', '--timeout=30',
                       f'--allow-interactive-authorization={interactive}', 'call', *arguments) as pending:
            yield pending


class Pending:
    """A program that waits for go(). Both block: asyncio.to_thread where an agent is in the same loop."""

    def __init__(self, process: 'subprocess.Popen[str]') -> None:
        self._process, self.pid = process, process.pid

    def go(self) -> tuple[int, str, str]:
        """Exit status, output, errors."""
        out, err = self._process.communicate('go\n', timeout=PATIENCE * 2)
        return self._process.returncode, out, err

    def answer(self) -> Any:
        """Of a call: values of the answer, None for none, or the words of the error."""
        status, out, err = self.go()
        if status:
            return err.strip()
        return json.loads(out)['data'] if out else None


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def start_time(pid: int) -> int:
    """What with a pid names a process for polkit: clock ticks since boot, proc_pid_stat(5) field 22."""
    return read_stat(pid).start_time
