# SPDX-License-Identifier: LGPL-2.1-or-later
"""Terminals of an ordinary user: they come back with their data, and with no right that the user lacks."""

from pathlib import Path

import pytest

from ckptd.errors import Busy, PermissionDenied
from ckptd.image.reader import ImageReader
from ckptd.image.records import SavedFile
from ckptd.journal.steps import TakeFromTerminal
from ckptd.objects.files.terminal.tty import MASTER, Tty
from ckptd.protocol.broker_calls import NoteTaken
from tests.lib.bus import Served
from tests.security.attacker import Attacker
from tests.security.test_inotify import asked

# a session on a terminal whose master is in the tree; a line and output wait in another one
WITH_TERMINALS = """
import pty, termios
waiting, exclusive = os.openpty(), os.openpty()
fcntl.ioctl(exclusive[1], termios.TIOCEXCL)
os.write(waiting[1], b'output')
os.write(waiting[0], b'a line\\n')
while not struct.unpack('i', fcntl.ioctl(waiting[1], termios.FIONREAD, bytes(4)))[0]:
    time.sleep(0)
told, tell = os.pipe()
pid, master = pty.fork()
if pid == 0:
    os.close(tell)
    not_the_one_to_report()
    os.write(1, b'!')
    os.read(told, 1)
    own = os.open('/dev/tty', os.O_RDWR)
    os.write(own, f'{os.ttyname(0)} {os.tcgetpgrp(0) == os.getpid()}'.encode())
    os.read(0, 1)
    os._exit(0)
os.close(told)
assert os.read(master, 1) == b'!'
fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack('4H', 33, 44, 0, 0))
name = os.readlink(f'/proc/{pid}/fd/0')
ready()
wait_for_go()
answer = [os.read(waiting[0], 100), os.read(waiting[1], 100),
          struct.unpack('4H', fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(8)))[:2],
          fcntl.ioctl(exclusive[1], 0x80045440, bytes(4))[0]]
os.write(tell, b'?')
say([*answer, os.read(master, 100).decode() == f'{name} True'])
"""
ANSWER = str([b'outputa line\r\n', b'a line\n', (33, 44), 1, True])


def test_a_users_terminals_come_back(served: Served, attacker: Attacker) -> None:
    program = attacker.start(WITH_TERMINALS)
    image = attacker.checkpoint(program, after='kill')
    with ImageReader(served.spool / image) as reader:
        records = [Tty.decode(saved.data) for saved in reader.every(SavedFile) if saved.kind == 'tty']
        assert reader.manifest.owner_uid == attacker.uid
    assert sum(bool(record.unread) for record in records if record.side == MASTER) == 1
    outcome = attacker.restore(image)
    assert outcome.root == program.pid, outcome.words
    assert program.ask() == ANSWER


def test_what_waits_in_an_exclusive_terminal(attacker: Attacker) -> None:
    """Its slave cannot be opened by a user, so nothing is taken out and the tree lives on."""
    program = attacker.start(WITH_TERMINALS.replace('os.openpty(), os.openpty()', '(one := os.openpty()), one'))
    with pytest.raises(Busy, match='has not been read yet'):
        attacker.checkpoint(program)
    assert program.ask() == ANSWER


def test_data_is_taken_only_from_a_tree_that_is_killed(attacker: Attacker, tmp_path: Path) -> None:
    program = attacker.start('rest()')
    step = TakeFromTerminal(program.pid, 1, 0, 0, b'')
    with asked(attacker, program, tmp_path) as made, pytest.raises(PermissionDenied):
        made.answer(NoteTaken(step))
