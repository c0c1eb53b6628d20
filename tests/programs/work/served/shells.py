# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shells with somebody at the other end: a session of ssh, and jshell."""

import os
import subprocess
from pathlib import Path

from base import HOST, Served, is_

SSHD = """
ListenAddress {host}:{port}
HostKey {directory}/host
AuthorizedKeysFile {directory}/key.pub
PidFile none
UsePAM {pam}
StrictModes no
PermitRootLogin yes
"""


class Sshd(Served):
    """Two sessions, one with a terminal, and a new one in each round."""

    user, pam = 'root', 'no'

    def start(self) -> None:
        for name in ('host', 'key'):
            subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', name], check=True)
        Path('sshd.conf').write_text(SSHD.format(host=HOST, port=self.port, directory=Path.cwd(), pam=self.pam))
        self.run('/usr/sbin/sshd', '-D', '-e', '-f', str(Path('sshd.conf').absolute()))
        self.connect((HOST, self.port)).close()
        self.plain = self.log_in('-T', 'sh')
        self.terminal = self.log_in('-tt', 'stty -echo; exec sh')
        is_(self.say(self.plain, 'echo $((6*7))'), b'42')
        self.terminal.stdin.write(b'PS1=; echo $((6*8))\n')
        self.terminal.stdin.flush()
        while b'48' not in self.terminal.stdout.readline():
            pass

    def log_in(self, *command: str) -> 'subprocess.Popen[bytes]':
        return subprocess.Popen(
            ['ssh', '-F', 'none', '-q', '-p', str(self.port), '-i', 'key', '-o', 'StrictHostKeyChecking=no', '-o',
             'UserKnownHostsFile=/dev/null', command[0], f'{self.user}@{HOST}', *command[1:]], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)

    def say(self, session: 'subprocess.Popen[bytes]', command: str) -> bytes:
        session.stdin.write(command.encode() + b'\n')
        session.stdin.flush()
        return session.stdout.readline().strip()

    def use(self, number: int) -> None:
        is_(self.say(self.plain, f'echo $((6*{number}))'), b'%d' % (6 * number))
        is_(self.say(self.terminal, f'echo $((7*{number}))'), b'%d' % (7 * number))
        assert self.say(self.terminal, 'tty').startswith(b'/dev/pts/')
        new = self.log_in('-T', 'sh')
        is_(self.say(new, f'echo {number}'), b'%d' % number)
        new.stdin.close()
        is_(new.wait(20), 0)
        new.stdout.close()


class SshdOfAUser(Sshd):
    """Sessions of a user, for each of which sshd has a process of root's and one of the user's."""

    user, pam = 'postgres', 'yes'


class Jshell(Served):
    """jshell(1) runs what it is told in a second virtual machine, with which it speaks over TCP."""

    def start(self) -> None:
        self.shell = subprocess.Popen(['jshell', '-s', '-'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                      env={**os.environ, 'HOME': str(Path.cwd())})
        is_(self.say('int count = 0; System.out.println("ready");'), 'ready')

    def say(self, line: str) -> str:
        self.shell.stdin.write(line + '\n')
        self.shell.stdin.flush()
        return self.shell.stdout.readline().strip()

    def use(self, number: int) -> None:
        is_(self.say('System.out.println(++count);'), str(number))
