# SPDX-License-Identifier: LGPL-2.1-or-later
"""The controlling terminal of a process, and its foreground process group. A session gets a terminal of the tree, or
the caller's.

The leader acquires it before it makes other processes, which inherit it (fork(2)). A process of the session that had
given it up (TIOCNOTTY) does so again.
"""

import struct
import termios

from ckptd.image.records import ProcessState
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Scope, Stage
from ckptd.objects.support import Support

_U32 = 2**32 - 1


class ControllingTerminal(Attribute[ProcessState, None], name='controlling-terminal', scope=Scope.PROCESS,
                          stage=Stage.SESSION):
    """The terminal of a session."""
    support = Support('controlling terminal', restored='partly')

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        return {'tty': of.process.stat.tty_nr & _U32}

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        if record.tty and to.sid == record.vpid and (fd := to.means.terminal(to.sid)) >= 0:
            to.script.call('ioctl', fd, termios.TIOCSCTTY, 0, about='the controlling terminal')


class ForegroundGroup(Attribute[ProcessState, None], name='terminal', scope=Scope.PROCESS):
    """The foreground group of a terminal."""
    support = Support('foreground process group of the terminal')

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        """Dump the group. One outside of the tree is 0."""
        return {'tpgid': of.process.groups.get(of.process.stat.tpgid, 0)}

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        fd = to.means.terminal(to.sid)
        if fd < 0:
            return
        if to.sid == record.vpid and record.tty:
            foreground = struct.pack('<i4x', record.tpgid or to.pgid)
            to.script.call('ioctl', fd, termios.TIOCSPGRP, foreground, about='the foreground group of the terminal')
        elif not record.tty:
            to.script.call('ioctl', fd, termios.TIOCNOTTY, 0, about='the session without its terminal')
