# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a user runs beside their programs: a bus, agents with keys, programs that watch files, and transfers."""

import os
import socket
import subprocess
from pathlib import Path

from base import Served, asked, is_
from jeepney import DBusAddress, new_method_call, new_method_return, new_signal
from jeepney.io.blocking import DBusConnection, open_dbus_connection
from transfers import Curl, Rsync


class Dbus(Served):
    """A bus, one client that owns a name, and one that calls it."""

    def start(self) -> None:
        address = f'unix:path={Path.cwd()}/bus'
        self.run('dbus-daemon', '--session', '--nofork', '--nopidfile', f'--address={address}')
        self.connect('bus').close()
        self.service, self.client = open_dbus_connection(address), open_dbus_connection(address)
        is_(self.call('RequestName', 'su', ('org.example.Counter', 0), self.service), (1,))
        self.call('AddMatch', 's', ("type='signal',interface='org.example.Counter'",), self.client)

    def call(self, method: str, signature: str, values: tuple[object, ...], connection: DBusConnection) -> object:
        bus = DBusAddress('/org/freedesktop/DBus', 'org.freedesktop.DBus', 'org.freedesktop.DBus')
        return connection.send_and_get_reply(new_method_call(bus, method, signature, values), timeout=20).body

    def use(self, number: int) -> None:
        is_(self.call('GetConnectionUnixProcessID', 's', ('org.example.Counter',), self.client), (os.getpid(),))
        counter = DBusAddress('/', 'org.example.Counter', 'org.example.Counter')
        self.client.send(new_method_call(counter, 'Count', 'u', (number,)))
        call = self.service.receive(timeout=20)
        is_(call.body, (number,))
        self.service.send(new_method_return(call, 'u', (number + 1,)))
        is_(self.client.receive(timeout=20).body, (number + 1,))
        self.service.send(new_signal(counter, 'Counted', 'u', (number,)))
        is_(self.client.receive(timeout=20).body, (number,))


class SshAgent(Served):
    """ssh-agent(1), which has set-group-ID and is not dumpable, with a key, and a connection that is kept."""

    def start(self) -> None:
        self.run('ssh-agent', '-D', '-a', 'agent')
        self.kept = self.connect('agent')
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', 'of the test', '-f', 'key'], check=True)
        self.ask('ssh-add', '-q', 'key')
        Path('key').unlink()

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env={**os.environ, 'SSH_AUTH_SOCK': 'agent'}, check=True, text=True,
                              stdout=subprocess.PIPE).stdout

    def use(self, number: int) -> None:
        assert 'of the test' in self.ask('ssh-add', '-l')
        message = Path(f'message.{number}')
        message.write_text(f'{number}\n')
        self.ask('ssh-keygen', '-q', '-Y', 'sign', '-f', 'key.pub', '-n', 'test', message.name)
        assert Path(f'message.{number}.sig').read_text().startswith('-----BEGIN SSH SIGNATURE')
        # SSH_AGENTC_REQUEST_IDENTITIES, SSH_AGENT_IDENTITIES_ANSWER with one key
        is_(asked(self.kept, b'\0\0\0\1\13', 9)[4:], b'\14\0\0\0\1')
        length = int.from_bytes(asked(self.kept, b'', 4))
        asked(self.kept, b'', length)
        asked(self.kept, b'', int.from_bytes(asked(self.kept, b'', 4)))


class GpgAgent(Served):
    """gpg-agent(1), which locks its secrets in memory, with a key that only it can read."""

    def start(self) -> None:
        home = Path('home')
        home.mkdir(mode=0o700)
        self.env = {**os.environ, 'GNUPGHOME': str(home.absolute())}
        # its parent is the program that it is started for
        self.server = subprocess.Popen(
            ['gpg-agent', '--no-detach', '--log-file', str(Path('gpg-agent.log').absolute()), '--daemon', 'sleep',
             'infinity'], env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        place = subprocess.run(['gpgconf', '--list-dirs', 'agent-socket'], env=self.env, check=True, text=True,
                               stdout=subprocess.PIPE).stdout.strip()
        self.kept = self.connect(place)
        self.answer(self.kept)
        self.pid = b''
        self.gpg('--passphrase', 'secret', '--quick-gen-key', 'somebody', 'ed25519', 'sign', 'never')

    def gpg(self, *words: str) -> str:
        return subprocess.run(['gpg', '--batch', '--no-tty', '--pinentry-mode', 'loopback', *words],
                              env=self.env, check=True, text=True, stdout=subprocess.PIPE, input='text\n').stdout

    def answer(self, sock: socket.socket) -> list[bytes]:
        said = b''
        while not said.startswith(b'OK') and b'\nOK' not in said:
            said += asked(sock, b'', 1)
        while not said.endswith(b'\n'):
            said += asked(sock, b'', 1)
        return said.splitlines()

    def use(self, number: int) -> None:
        self.kept.sendall(b'GETINFO pid\n')
        pid = self.answer(self.kept)[0]
        is_(pid, self.pid or pid)
        self.pid = pid
        words = ('--passphrase', 'secret') if number == 1 else ()       # the agent keeps it
        assert '-----BEGIN PGP SIGNED MESSAGE' in self.gpg(*words, '--clearsign')


class Watchers(Served):
    """tail -f and inotifywait."""

    def start(self) -> None:
        Path('grows').write_text('0\n')
        Path('watched').mkdir()
        self.tail = subprocess.Popen(['tail', '-f', 'grows'], stdout=subprocess.PIPE)
        is_(self.tail.stdout.readline(), b'0\n')
        self.watch = subprocess.Popen(['inotifywait', '--monitor', '--recursive', '--event', 'create,close_write',
                                       '--format', '%e %f', 'watched'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while b'established' not in self.watch.stderr.readline():
            pass

    def use(self, number: int) -> None:
        with Path('grows').open('a') as file:
            file.write(f'{number}\n')
        is_(self.tail.stdout.readline(), b'%d\n' % number)
        Path(f'watched/{number}').write_text('')
        is_(self.watch.stdout.readline(), b'CREATE %d\n' % number)
        is_(self.watch.stdout.readline(), b'CLOSE_WRITE,CLOSE %d\n' % number)


class Session(Served):
    """All of them in one tree."""

    def start(self) -> None:
        self.parts = [part(self.port) for part in (Dbus, SshAgent, GpgAgent, Watchers, Curl, Rsync)]

    def use(self, number: int) -> None:
        for part in self.parts:
            part.use(number)
