# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root, working directory and umask of a shared fs struct (clone(2), CLONE_FS)."""

import os
import re
from contextlib import suppress

from ckptd.errors import Finding
from ckptd.image.records import Fs
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.status import Status
from ckptd.kernel.task import read_link
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Scope
from ckptd.objects.support import Support
from ckptd.tree import Task

_OF_PROCESS = re.compile(r'/proc/\d+(?:/|$| )')


class Directories(Attribute[Fs, tuple[str, str]], name='directories', scope=Scope.FS):
    support = Support('root, working directory and umask', dumped='name',
                      refused='a directory in /proc of a process that has ended',
                      user='another root directory is refused')

    def findings(self, task: Task, status: Status) -> list[Finding]:
        """Refuse a directory in /proc of a process that has ended: nobody can enter such a one (fs/proc/base.c,
        proc_pid_permission)."""
        with suppress(OSError):
            cwd = read_link(task.tid, 'cwd')
            if _OF_PROCESS.match(cwd) and not os.path.lexists(f'/proc/{task.tid}/root{cwd}'):
                return [Finding(task.tid, task.comm, 'cwd', 'ENOENT', f'works in {cwd}, the directory of a process '
                                'that has ended', 'have it change its working directory first')]
        return []

    def look(self, tracee: Tracee) -> tuple[str, str]:
        return read_link(tracee.tid, 'cwd'), read_link(tracee.tid, 'root')

    def dump(self, of: DumpedTask, answer: tuple[str, str]) -> Fields:
        cwd, root = answer
        return {'cwd': cwd, 'root': root, 'umask': of.status.umask}

    def restore(self, record: Fs, to: RestoredTask) -> None:
        script, directory = to.script, to.means.directory
        if record.root != '/':
            script.call('fchdir', directory(record.root), about=f'root directory {record.root}')
            script.call('chroot', b'.\0', about=f'root directory {record.root}')
        script.call('fchdir', directory(record.cwd), about=f'working directory {record.cwd}')
        script.call('umask', record.umask)
