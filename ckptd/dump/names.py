# SPDX-License-Identifier: LGPL-2.1-or-later
"""Give a new name to a deleted file that still has another name, which is not found. link(2) names the file itself, not
a copy.

The new name is in the directory of the old one. The journal has it until the image is published. From then on the image
has it. A restart opens the file by the new name and removes the name. The removal of the image also removes it.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

from ckptd.errors import CkptError
from ckptd.faults import fault
from ckptd.journal.steps import LinkFile
from ckptd.kernel.namei import open_below, root_of_task
from ckptd.objects.files.base import OpenFile
from ckptd.objects.files.linked import DeletedFile, name_for, rights_to_link
from ckptd.objects.files.other_names import living_name
from ckptd.operation.context import Names


class LinkNames:
    """The new names of one checkpoint. Each file gets one name, even if several descriptions refer to it."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._known: dict[tuple[int, int], str] = {}
        self._living: dict[tuple[int, int], str] = {}       # '' if none was found before the new one was made

    def __len__(self) -> int:
        """Return the number of new names."""
        return len(self._known)

    def link_back(self, file: OpenFile) -> str:
        """Return a living name of the file, or give it a new one. CkptError if that fails."""
        with file.duplicate() as fd:
            return self.link(DeletedFile.of(file), fd)

    def link(self, file: DeletedFile, fd: int) -> str:
        """Return a living name of a file that is open as `fd`, or give it a new one. CkptError if that fails."""
        key = file.stat.st_dev, file.stat.st_ino
        if key not in self._living:
            self._living[key] = living_name(file.tid, file.path, *key)
        if self._living[key]:
            return self._living[key]
        if key not in self._known:
            try:
                self._known[key] = self._link(file, fd)
            except OSError as error:
                raise CkptError(f'{file.path} is deleted but has another name, and cannot get a further one for the '
                                f'image: {error.strerror}', errno=error.errno, resource=file.path, phase='state',
                                hint='delete the other name, or give the file its name back (ln)') from error
        return self._known[key]

    def _link(self, file: DeletedFile, fd: int) -> str:
        home, name = str(PurePath(file.path).parent), name_for(file.path, secrets.token_hex(8))
        path = str(PurePath(home, name))
        of = file.stat
        with _opened_root(file.tid) as root, rights_to_link(file.pid) as rights:
            directory = open_below(root, home, os.O_PATH | os.O_DIRECTORY)
            try:
                self._names.note(LinkFile(path, of.st_dev, of.st_ino, self._names.image, *rights))
                fault('name-link')
                # linkat(2): AT_EMPTY_PATH requires a capability, and the link of /proc does not
                os.link(f'/proc/self/fd/{fd}', name, dst_dir_fd=directory, follow_symlinks=True)
            finally:
                os.close(directory)
        fault('name-link-done')
        return path


@contextmanager
def _opened_root(tid: int) -> Iterator[int]:
    """Open the root directory of the paths of a task."""
    fd = os.open(root_of_task(tid) or '/', os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
