# SPDX-License-Identifier: LGPL-2.1-or-later
"""The controlling terminal of a process, and its foreground process group. Session leaders get the caller's
terminal."""

import struct
import termios

from ckptd.image.records import ProcessState
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Scope
from ckptd.objects.support import Support

_U32 = 2**32 - 1


class ControllingTerminal(Attribute[ProcessState, None], name='terminal', scope=Scope.PROCESS):
    support = Support('controlling terminal and foreground process group', restored='partly')

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        """Dump the terminal. A foreground group outside of the tree is 0."""
        stat = of.process.stat
        return {'tty': stat.tty_nr & _U32, 'tpgid': of.process.groups.get(stat.tpgid, 0)}

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        if record.tty and to.sid == record.vpid and (fd := to.means.terminal()) >= 0:
            to.script.call('ioctl', fd, termios.TIOCSCTTY, 0, about='the controlling terminal')
            foreground = struct.pack('<i4x', record.tpgid or to.pgid)
            to.script.call('ioctl', fd, termios.TIOCSPGRP, foreground, about='the foreground group of the terminal')
