# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs on terminals that their client has made, which is in the tree."""

import os
import pty
import re
import subprocess
import threading
from pathlib import Path

from base import Served, is_

CONTROL = re.compile(r'\x1b\[[\d;?]*[a-zA-Z]|\x1b[=>()]B?|\x1b\][^\x07]*\x07')


class Terminal:
    """A program on a pseudo-terminal, whose master we have; a thread reads all that it says, as an emulator does."""

    def __init__(self, *command: str) -> None:
        pid, self.master = pty.fork()
        if pid == 0:
            os.environ.update(TERM='xterm', PS1='$ ', PYTHON_HISTORY='/dev/null', INPUTRC='/dev/null')
            os.execvp(command[0], command)
        self.said, self.more = '', threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        while True:
            data = os.read(self.master, 4096).decode(errors='replace')
            with self.more:
                self.said += data
                self.more.notify()

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, pattern: str) -> None:
        """Wait until the program has said that, without control sequences."""
        with self.more:
            def has_said() -> 're.Match[str] | None':
                self.said = CONTROL.sub('', self.said)
                return re.search(pattern, self.said, re.DOTALL)
            found = self.more.wait_for(has_said, 20)
            assert found, f'no {pattern!r} in {self.said!r}'
            self.said = self.said[found.end():]


class Terminals(Served):
    """A shell with a stopped job, a pager that follows a file, and an interpreter."""

    def start(self) -> None:
        Path('log').write_text('line 0\n')
        self.shell = Terminal('bash', '--norc', '--noprofile', '-i')
        self.shell.until(r'\$ ')
        self.shell.type('cat\r')
        self.shell.until(r'cat\r\n')
        self.shell.type('it reads\r')
        self.shell.until(r'it reads\r\nit reads\r\n')      # the echo, and what cat says
        self.stop_job()
        self.pager = Terminal('less', '+F', 'log')
        self.pager.until('line 0.*Waiting for data')
        self.python = Terminal('/usr/bin/python3', '-q')
        self.python.type('rounds = []\r')
        self.python.until('>>> .*>>> ')

    def stop_job(self) -> None:
        self.shell.type('\x1a')
        self.shell.until(r'Stopped +cat')

    def use(self, number: int) -> None:
        self.shell.type('jobs; fg\r')
        self.shell.until(r'\[1\]\+ +Stopped +cat\r\n')
        self.shell.until(r'cat\r\n')
        self.shell.type(f'round {number}\r')
        self.shell.until(rf'round {number}\r\nround {number}\r\n')
        self.stop_job()
        with Path('log').open('a') as log:
            log.write(f'line {number}\n')
        self.pager.until(f'line {number}')
        self.python.type('rounds.append(len(rounds)); print(f"= {rounds}")\r')
        self.python.until(re.escape(f'= {[*range(number)]}'))


class Ipython(Served):
    """IPython, which draws its prompt by itself."""

    def start(self) -> None:
        os.environ['IPYTHONDIR'] = f'{Path.cwd()}/ipython'
        self.terminal = Terminal('/usr/bin/ipython3', '--no-banner', '--no-confirm-exit', '--colors=NoColor')
        self.terminal.until(r'In \[1\]')

    def use(self, number: int) -> None:
        self.terminal.type(f'print("=", {number} * 7)\r')
        self.terminal.until(f'= {number * 7}')
        self.terminal.until(rf'In \[{number + 1}\]')


PEXPECT = """
import pexpect, sys
shell = pexpect.spawn('bash', ['--norc', '--noprofile'], env={'PS1': 'ready> ', 'PATH': '/usr/bin:/bin'}, echo=False)
shell.expect('ready> ')
for line in sys.stdin:
    shell.sendline(f'number=$((number + 1)); echo = $number {line.strip()}')
    shell.expect(r'= (\\d+) (\\w+)\\r\\n.*ready> ', timeout=20)
    print(shell.match[1].decode(), shell.match[2].decode(), flush=True)
"""


class Pexpect(Served):
    """A program that drives a shell by pexpect."""

    def start(self) -> None:
        self.server = subprocess.Popen(['/usr/bin/python3', '-c', PEXPECT], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True, bufsize=1)

    def use(self, number: int) -> None:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(f'round{number}\n')
        is_(self.server.stdout.readline(), f'{number} round{number}\n')
