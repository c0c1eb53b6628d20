# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names for deleted files that still have another one, which nobody knows: link(2) brings the very same file back.

The new name is in the directory of the old one. It is in the journal until the image is published, and in the image
from then on: a restart opens the file by it and takes it away, and so does the removal of the image.
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
from ckptd.operation.context import Names


class LinkNames:
    """The names of one checkpoint: each file gets one, however many descriptions it has."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._known: dict[tuple[int, int], str] = {}

    def __len__(self) -> int:
        return len(self._known)

    def link_back(self, file: OpenFile) -> str:
        """The path of the file's new name. CkptError where it cannot get one."""
        with file.duplicate() as fd:
            return self.link(DeletedFile.of(file), fd)

    def link(self, file: DeletedFile, fd: int) -> str:
        """The path of the new name of a file that is open as `fd`. CkptError where it cannot get one."""
        key = file.stat.st_dev, file.stat.st_ino
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
                # linkat(2): AT_EMPTY_PATH takes a right that users lack, and the link of /proc does not
                os.link(f'/proc/self/fd/{fd}', name, dst_dir_fd=directory, follow_symlinks=True)
            finally:
                os.close(directory)
        fault('name-link-done')
        return path


@contextmanager
def _opened_root(tid: int) -> Iterator[int]:
    """The directory that paths of a task begin at."""
    fd = os.open(root_of_task(tid) or '/', os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
