# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deleted files that have another name. If that is found (other_names.py), a restart opens the file by it. Otherwise a
checkpoint gives the file a new name: dump/names.py."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import NamedTuple, Self

from ckptd.errors import Finding
from ckptd.kernel.creds import CAP_SYS_PTRACE, file_rights
from ckptd.kernel.namei import has_known_mounts, lstat_of_task, open_direct, root_of_task
from ckptd.kernel.status import read_status
from ckptd.objects.files.base import OpenFile, finding
from ckptd.objects.files.other_names import MARK, is_name, living_name

_HINT = 'delete the other name, or give the file its name back (ln)'

Rights = tuple[int, int, tuple[int, ...]]


class DeletedFile(NamedTuple):
    """A file of a task that has lost the name `path`."""
    pid: int
    tid: int
    path: str
    stat: os.stat_result
    magic_link: str     # in /proc, to the file itself

    @classmethod
    def of(cls, file: OpenFile) -> Self:
        return cls(file.pid, file.tid, file.path, file.stat, file.proc_path)


def name_for(path: str, token: str) -> str:
    """Return a name of the form that only a checkpoint uses. It contains the old name if that is printable ASCII."""
    name = PurePath(path).name
    if is_name(path):
        name = name[1:name.rindex(MARK)]
    if not name.isascii() or not name.isprintable():
        name = 'deleted'
    return f'.{name[:200]}{MARK}{token}'


@contextmanager
def rights_to_link(pid: int) -> Iterator[Rights]:
    """Yield the rights to link with: as root, those of a process that has the file; as another user, our own."""
    if os.geteuid():
        yield os.geteuid(), os.getegid(), tuple(os.getgroups())
        return
    status = read_status(pid)
    rights = status.uids[3], status.gids[3], tuple(status.groups)
    with file_rights(*rights, 1 << CAP_SYS_PTRACE):
        yield rights


def link_findings(file: DeletedFile) -> list[Finding]:
    """List the reasons why a deleted file whose other name is not found cannot get one in the directory of its old
    one."""
    if living_name(file.tid, file.path, file.stat.st_dev, file.stat.st_ino):
        return []
    home = str(PurePath(file.path).parent)
    what = f'{file.path} is deleted but has another name, and cannot get a further one for the image'
    found = lstat_of_task(file.tid, home)
    if not _is_text(home):
        return [finding('EILSEQ', f'{what}: the name of its directory is not UTF-8', _HINT)]
    if found is None or not stat.S_ISDIR(found.st_mode):
        return [finding('ENOENT', f'{what}: its directory is gone', _HINT)]
    if found.st_dev != file.stat.st_dev:
        return [finding('EXDEV', f'{what}: its directory is on another file system now', _HINT)]
    if not has_known_mounts(file.tid):
        return [finding('EXDEV', f'{what}: it is in another mount namespace', _HINT)]
    with rights_to_link(file.pid) as (uid, *_):
        may = os.access(root_of_task(file.tid) + home, os.W_OK | os.X_OK, effective_ids=True)
        # proc_sys_fs(5), protected_hardlinks
        is_safe = uid in (0, file.stat.st_uid) or os.access(file.magic_link, os.R_OK | os.W_OK, effective_ids=True)
    if not may or not is_safe:
        reason = f'{home} may not be written' if not may else 'it belongs to another user'
        return [finding('EACCES', f'{what}: {reason}', _HINT)]
    return []


def lost_name(path: str, link: str) -> tuple[str, str]:
    """Return reason and hint for a file that is no longer found by its other name."""
    if is_name(link):
        return (f'{path} was deleted, and its name for the image, {link}, is gone',
                'it can be restored once: the restart removes that name')
    return f'{path} was deleted, and its other name, {link}, is gone', 'put exactly that file back'


def take_away(path: str, inode: int) -> None:
    """Unlink such a name if it still is that file. Do nothing if it does not exist. OSError."""
    if not is_name(path):
        return
    pure = PurePath(path)
    try:
        directory = open_direct(str(pure.parent), os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        found = os.stat(pure.name, dir_fd=directory, follow_symlinks=False)
        if found.st_ino == inode:
            os.unlink(pure.name, dir_fd=directory)
    except FileNotFoundError:
        return
    finally:
        os.close(directory)


def _is_text(path: str) -> bool:
    return not any(0xDC80 <= ord(character) <= 0xDCFF for character in path)
