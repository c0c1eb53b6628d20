# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find a living name of a file that a task knows by a deleted one: glibc's sem_open(3) makes a file under a temporary
name, links it to its real one and unlinks the first, so the creator of a named semaphore maps a deleted file.

No call tells the names of an inode. They are searched in the directory of the old name, then among the files that all
processes map, then among those that they have open. Each name is confirmed by lstat(2).
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePath

from ckptd.kernel.fdinfo import list_fds, read_fdinfo
from ckptd.kernel.maps import DELETED, read_maps
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.namei import lstat_of_task, root_of_task
from ckptd.kernel.procfs import list_numbers
from ckptd.kernel.task import read_link

MARK = '.ckptd-'
_OURS = re.compile(r'\..*\.ckptd-[0-9a-f]{16}', re.DOTALL)
MAX_ENTRIES = 50_000        # of the directory, which is read while the tree is at rest: some 50 ms


def living_name(tid: int, path: str, device: int, inode: int) -> str:
    """Return a path by which task `tid` reaches the file now; '' if none is found. path: the one that is deleted.
    device: st_dev of the file."""
    for find in (_in_directory, _among_mapped, _among_open):
        for name in find(tid, path, device, inode):
            if is_name(name) or not is_link(name):
                continue
            found = lstat_of_task(tid, name)
            if found is not None and (found.st_dev, found.st_ino) == (device, inode):
                return name
    return ''


def is_link(path: str) -> bool:
    """Return whether a path can be one of `living_name`: absolute, without `..`, and UTF-8."""
    return (path.startswith('/') and '..' not in path.split('/')
            and not any(0xDC80 <= ord(character) <= 0xDCFF for character in path))


def is_name(path: str) -> bool:
    """Return whether a path is absolute, has no `..` and ends in a name of the form that only a checkpoint gives. It
    belongs to the image of that checkpoint."""
    return path.startswith('/') and '..' not in path.split('/') and bool(_OURS.fullmatch(PurePath(path).name))


def _in_directory(tid: int, path: str, _: int, inode: int) -> Iterator[str]:
    home = str(PurePath(path).parent)
    with suppress(OSError), os.scandir(root_of_task(tid) + home) as entries:
        for _, entry in zip(range(MAX_ENTRIES), entries, strict=False):
            if entry.inode() == inode:
                yield str(PurePath(home, entry.name))


def _among_mapped(tid: int, path: str, device: int, inode: int) -> Iterator[str]:
    number = os.major(device), os.minor(device)
    for pid in list_numbers('/proc', ''):
        with suppress(OSError):     # it has ended, or may not be looked at
            for mapping in read_maps(pid):
                if (mapping.inode, mapping.major, mapping.minor) == (inode, *number) and not mapping.deleted:
                    yield mapping.file_path


def _among_open(tid: int, path: str, device: int, inode: int) -> Iterator[str]:
    """Yield paths of open files. fdinfo tells inode and mount, so no file system is asked about other files."""
    root = root_of_task(tid)
    mounts = {mount.id for mount in read_mountinfo(tid if root else None)
              if os.makedev(mount.major, mount.minor) == device}
    for pid in list_numbers('/proc', '') if mounts else ():
        with suppress(OSError):
            for fd in list_fds(pid):
                link = read_link(pid, f'fd/{fd}')
                if link.startswith('/') and not link.endswith(DELETED):
                    info = read_fdinfo(pid, fd)
                    if info.ino == inode and info.mnt_id in mounts:
                        yield link
