# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open and make files of an image during a restart. No task is needed for it."""

import re
from collections.abc import Callable, Hashable

from ckptd.errors import ImageDamaged
from ckptd.image.reader import ImageReader
from ckptd.image.records import Extent
from ckptd.inspect.checks import CallerRights
from ckptd.kernel.copyrange import copy_with_holes
from ckptd.kernel.creds import CAP_SYS_PTRACE
from ckptd.objects.files.base import ChangedFiles, InheritedFiles
from ckptd.restore.cgroups import Placement
from ckptd.restore.file_access import FileAccess
from ckptd.restore.file_changes import FileChanges
from ckptd.restore.service_fds import ServiceFds

# files of /proc about a process; the deepest is fdinfo of a task
_SHOWS = re.compile(r'/proc/(\d{1,10})/(?:task/\d{1,10}/)?(?:fdinfo/\d{1,10}|[a-z_]+)')


class FileMaker(FileAccess):
    """Access to files, and the means to make and change them, see objects.files.restoring.FileMaking.

    place: has the journal of changed files. keep_free: see FileChanges.
    """

    def __init__(self, reader: ImageReader, service_fds: ServiceFds, caller: CallerRights, changed_files: ChangedFiles,
                 terminal_fd: int, inherited: InheritedFiles, place: Placement, keep_free: int, *,
                 detach_terminal: bool) -> None:
        super().__init__(reader, caller, changed_files, terminal_fd, inherited, detach_terminal=detach_terminal)
        self._service_fds = service_fds
        self._changes = FileChanges(place, self.rights, self.rights_to, keep_free)

    def _needed_for(self, path: str) -> int:
        # A task of the tree gets its rights last and has root's until then. To open its maps, /proc requires the right
        # to trace it (proc_pid_maps(5)), which its user has.
        found = _SHOWS.fullmatch(path)
        return 1 << CAP_SYS_PTRACE if found and self._pids.get(int(found[1])) == int(found[1]) else 0

    def once(self, key: Hashable, make: Callable[[], int]) -> int:
        return self._service_fds.once(key, make)

    def keep(self, path: str, fd: int, start: int) -> None:
        self._changes.keep(path, fd, start)

    def open_linked(self, link: str, path: str, flags: int) -> int:
        return self._changes.open_linked(link, path, lambda name: self.open(name, flags))

    def make_file(self, path: str, fill: Callable[[int], None]) -> None:
        self._changes.make(path, fill)

    def bind(self, path: str, bind: Callable[[], None]) -> int:
        return self._changes.bind(path, bind)

    def copy(self, extent: Extent, fd: int, offset: int) -> None:
        done = copy_with_holes(self._reader.data_fd(extent.part), extent.offset, extent.length, fd, offset)
        if done < extent.length:
            raise ImageDamaged('a data part ends before an extent does')
