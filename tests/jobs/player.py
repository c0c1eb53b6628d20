# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker that plays a scene: `python player.py FD`, the scene's name in the request's target, 'cgroup:/SCENE', or
'cgroup:/SCENE/ANYTHING' where two trees play the same one.

It speaks the protocol of ckptd.protocol.messages without touching any tree, so that what the daemon's side does with
each turn of a job, a death included, is seen by itself.
"""

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import termios
from pathlib import Path
from typing import NoReturn

import msgspec

from ckptd.errors import Cancelled, Finding, Refused
from ckptd.protocol.messages import (
    MAX_MESSAGE,
    Cancel,
    Confined,
    Failed,
    Finished,
    Follow,
    Frozen,
    Log,
    Message,
    Phase,
    ProgressReport,
    ScopeRequest,
    Start,
    Thaw,
    ToWorker,
    TreeRuns,
    UnitDone,
    UnitRequest,
)


class Player:
    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.fds: list[int] = []

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.socket.send(msgspec.msgpack.encode(message))

    def hear(self) -> Message | None:
        data, fds, _, _ = socket.recv_fds(self.socket, MAX_MESSAGE, 4)
        message = msgspec.msgpack.decode(data, type=ToWorker) if data else None
        if isinstance(message, Follow):
            os.close(fds.pop())
            return self.hear()
        self.fds += fds
        return message

    def until_cancelled(self) -> NoReturn:
        if path := os.environ.get('PLAYER_FIFO'):
            with open(path, 'w') as fifo:  # noqa: PTH123 - as short as it gets
                fifo.write('here\n')
        while not isinstance(self.hear(), Cancel | None):
            pass
        self.say(Failed.of(Cancelled('as you wish')))
        sys.exit(130)

    # ------------------------------------------------------------ scenes

    def finish(self, start: Start) -> None:
        self.say(Phase('scan'), ProgressReport(1, 2, 0, 0), Phase('memory'), ProgressReport(2, 2, 50, 100),
                 Log(20, 'half'),
                 Finished({'image': start.request.image_id, 'tasks': 2,
                           'avoid': list(getattr(start.request, 'avoid', ()))}))

    def confined(self, start: Start) -> None:
        """As of a tree that needs a worker outside of the sandbox."""
        if getattr(start.request, 'may_move', False):
            self.say(Phase('scan'), Confined())
            sys.exit(0)
        pidfd = str(Path(f'/proc/self/fd/{self.fds[0]}').readlink()) if self.fds else ''
        self.say(Phase('scan'), Finished({'worker': os.getpid(), 'avoid': list(start.request.avoid), 'pidfd': pidfd}))

    def confined_late(self, start: Start) -> None:
        """The one outside waits to be cancelled."""
        if start.request.may_move:
            self.confined(start)
        self.say(Phase('memory'))
        self.until_cancelled()

    def refuse(self, start: Start) -> None:
        rows = [Finding(7, 'sh', 'fd 3', 'EOPNOTSUPP', 'is a socket', 'close it')] * 2
        self.say(Phase('scan'), Failed.of(Refused.because(rows)))
        sys.exit(3)

    def die(self, start: Start) -> None:
        self.say(Phase('memory'))
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self, start: Start) -> None:
        sys.exit(4)

    def babble(self, start: Start) -> None:
        self.socket.send(b'\xc1 is no msgpack')
        self.hear()

    def slow(self, start: Start) -> None:
        self.say(Phase('memory'))
        self.until_cancelled()

    def grow(self, start: Start) -> None:
        """It is about to write 100 bytes."""
        self.say(Phase('memory'), ProgressReport(1, 1, 0, 100))
        self.until_cancelled()

    def deaf(self, start: Start) -> None:
        self.say(Phase('memory'))
        signal.pause()

    def hasty(self, start: Start) -> None:
        """Ends with a message unread."""
        self.say(Phase('memory'))
        select.select([self.socket], [], [])
        self.say(Finished({'tasks': 1}))

    def many(self, start: Start) -> None:
        self.say(Phase('memory'), *(ProgressReport(1, 1, count, 1000) for count in range(1, 1001)), Finished({}))

    def rows(self, start: Start) -> None:
        self.say(Finished({'tasks': [{'tid': 1}], 'count': 3}, more=True), Finished({'tasks': [{'tid': 2}]}, more=True),
                 Finished({'tasks': [{'tid': 3}]}))

    def hold(self, start: Start) -> None:
        self.say(Phase('freeze'), Frozen(3, 'cgroup'), Finished({'tasks': 3}))
        while not isinstance(self.hear(), Thaw | Cancel | None):
            pass

    def claim(self, start: Start) -> None:
        self.say(Phase('freeze'), Frozen(3, 'cgroup'), Finished({'refusals': []}))

    def drop(self, start: Start) -> None:
        self.hold(start)
        os.kill(os.getpid(), signal.SIGKILL)

    def unit(self, start: Start) -> None:
        self.say(UnitRequest('a.service', 'freeze'))
        answer = self.hear()
        assert isinstance(answer, UnitDone)
        self.say(Finished({'error': answer.error}))

    def scope(self, start: Start) -> None:
        self.say(ScopeRequest('a.scope', (1, 2)))
        answer = self.hear()
        assert isinstance(answer, UnitDone)
        self.say(Finished({'error': answer.error}))

    def restore(self, start: Start) -> None:
        self.say(Phase('fill'), ProgressReport(2, 2, 1, 1), Phase('start'), TreeRuns(4242, 2),
                 Finished({'image': start.request.image, 'root': 4242, 'tasks': 2}))

    def attend(self, start: Start) -> None:
        """Until told to let go of it."""
        self.say(Phase('start'), TreeRuns(4242, 2), Phase('attend'))
        while not isinstance(self.hear(), Cancel | None):
            pass
        self.say(Finished({'root': 4242}))

    def watch(self, start: Start) -> None:
        """Until the end of the tree: of a pipe that was given."""
        self.say(Phase('start'), TreeRuns(4242, 2), Phase('attend'))
        os.read(self.fds[-1], 1)
        self.say(Finished({'root': 4242, 'exit_status': 3 << 8}))

    def program(self, start: Start, blind: bool = False) -> None:
        """A tree of one: what $PLAYER_SCRIPT says, on the terminal that was given."""
        terminal = self.fds[-1] if self.fds and not blind else subprocess.DEVNULL
        process = subprocess.Popen(
            ['sh', '-c', os.environ['PLAYER_SCRIPT']], stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True,
            preexec_fn=None if terminal < 0 else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        for fd in self.fds:
            os.close(fd)
        result = {'root': process.pid, 'tasks': 1, 'processes': 1, 'restored_usec': 1234}
        self.say(Phase('start'), TreeRuns(process.pid, 1))
        if start.request.wait:
            self.say(Phase('attend'))
            died = os.pidfd_open(process.pid)
            if died in select.select([died, self.socket], [], [])[0]:
                result['exit_status'] = os.waitpid(process.pid, 0)[1]
            else:
                self.hear()
        self.say(Finished(result))

    def blind(self, start: Start) -> None:
        """The same, without a terminal."""
        self.program(start, blind=True)

    def obstacles(self, start: Start) -> None:
        where = ' on its terminal' if self.fds else ''
        rows = [{'pid': 7, 'comm': 'sh', 'resource': f'pid {number}', 'errno': 'EEXIST',
                 'reason': f'in use by cat[8]{where}',
                 'hint': 'use --new-pidns', 'severity': severity}
                for number, severity in ((7, 'refusal'), (8, 'warning'))]
        self.say(Phase('verify'), Finished({'refusals': rows, 'options': [start.request.changed_files]}))

    def desert(self, start: Start) -> None:
        self.say(Phase('start'), TreeRuns(4242, 2), Phase('attend'))
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self, start: Start) -> None:
        os.write(self.fds[-1], b'written by the worker')
        self.say(Finished({}))


def main() -> None:
    player = Player(int(sys.argv[1]))
    start = player.hear()
    if isinstance(start, Start):
        scene = os.environ.get('PLAYER_SCENE') or start.request.about.removeprefix('cgroup:/').partition('/')[0]
        getattr(player, scene)(start)


if __name__ == '__main__':
    main()
