# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root, working directory and umask of a shared fs struct (clone(2), CLONE_FS)."""

from ckptd.image.records import Fs
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.task import read_link
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Scope
from ckptd.objects.support import Support


class Directories(Attribute[Fs, tuple[str, str]], name='directories', scope=Scope.FS):
    support = Support('root, working directory and umask', dumped='name', user='another root directory is refused')

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
