# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file or directory in /proc of a process or thread that has ended since it was opened. Nothing can be read of it
(ESRCH, ENOENT). A restart opens the same file of a process of its own, and ends that. So its path has another number.
"""

import os
import re

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.fork import waiting_child
from ckptd.kernel.statfs import PROC_SUPER_MAGIC
from ckptd.objects.files.base import (
    Content,
    FileLookup,
    Kind,
    OpenFile,
    RestoreContext,
    access_of,
    finding,
    of_process,
    opening,
)
from ckptd.objects.support import Support

# Files that refer to nothing but the process. Others keep its memory or its mount namespace, and there it is ours.
_NAMES = ('autogroup', 'cgroup', 'cmdline', 'comm', 'coredump_filter', 'cpuset', 'io', 'limits', 'loginuid', 'oom_adj',
          'oom_score', 'oom_score_adj', 'personality', 'sched', 'schedstat', 'sessionid', 'stack', 'stat', 'statm',
          'status', 'syscall', 'task', 'timers', 'timerslack_ns', 'wchan')
_PLACE = re.compile(rf'/proc/\d{{1,10}}(/task/\d{{1,10}})?(/(?:{"|".join(_NAMES)}))?')


@layout
class DeadProcessFile(Struct):
    """A file of a dead process. mode: its file type and permissions."""
    path: str
    mode: U32


class DeadProcessKind(Kind[DeadProcessFile], tag='dead'):
    support = Support('files in /proc of processes that have ended', dumped='name', restored='partly',
                      refused='those that refer to more than the process, such as mem and mounts',
                      user='files that only root may open are refused')

    def matches(self, file: OpenFile) -> bool:
        return is_of_dead_process(file)

    def findings(self, file: OpenFile) -> list[Finding]:
        if _PLACE.fullmatch(file.path):
            return []
        return [finding('EOPNOTSUPP', f'{file.path} is a file of a process that has ended', 'close it')]

    def dump(self, file: OpenFile, content: Content) -> DeadProcessFile:
        return DeadProcessFile(file.path, file.stat.st_mode)

    def restart_findings(self, record: DeadProcessFile, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if lookup.by_root or not lookup.uid or saved.flags & os.O_PATH or not access_of(saved.flags) & ~record.mode:
            return []
        return [finding('EACCES', f'{record.path} is a file of a process that has ended, which only root may open',
                        'restore it as root')]

    def create(self, record: DeadProcessFile, saved: SavedFile, ctx: RestoreContext) -> int:
        return _open(record.path, opening(saved.flags), ctx)


def is_of_dead_process(file: OpenFile) -> bool:
    """Whether an open file is one of /proc, and its process has ended. Another one may have the number by now."""
    return of_process(file.path) and file.magic == PROC_SUPER_MAGIC and not file.reachable


def _open(path: str, flags: int, ctx: RestoreContext) -> int:
    """Open the same file of a process that ends then. CkptError."""
    place = _PLACE.fullmatch(path)
    if place is None:
        raise CkptError(f'{path} is no file of a dead process that can be opened again', resource=path)
    of_thread, name = place.groups(default='')
    with waiting_child() as child:
        return ctx.open(f'/proc/{child}{f"/task/{child}" if of_thread else ""}{name}', flags)
