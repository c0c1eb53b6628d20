# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compare a file with the state that an image has of it. Pure: a record against a stat."""

import os
import stat
import time
from typing import NamedTuple

from ckptd.image.records import Backing

MISSING = 'is missing'
_TYPES = {stat.S_IFREG: 'regular file', stat.S_IFDIR: 'directory', stat.S_IFCHR: 'character device',
          stat.S_IFBLK: 'block device', stat.S_IFIFO: 'FIFO', stat.S_IFSOCK: 'socket', stat.S_IFLNK: 'link'}


class FileIdentity(NamedTuple):
    """The identity of a file in an image. The device number is left out, because it changes from boot to boot."""
    mode: int    # st_mode
    inode: int
    size: int
    mtime: int               # nanoseconds
    made_up: bool = False    # the file system generates the content, so size, time and inode are meaningless

    @classmethod
    def of_backing(cls, backing: Backing) -> 'FileIdentity':
        return cls(backing.mode, backing.inode, backing.size, backing.mtime)


def changes(saved: FileIdentity, found: os.stat_result | None) -> list[str]:
    """List each difference of the file, as words that follow its name. Empty if it is the same.

    'is missing' | 'is no longer a regular file' | 'is another file (inode 7, not 5)' | 'has 9,000 bytes, not 5,000' |
    'was written at 2026-01-02 03:04:05, not at 2026-01-01 00:00:00 (mtime)'
    """
    if found is None:
        return [MISSING]
    kind = stat.S_IFMT(saved.mode)
    if stat.S_IFMT(found.st_mode) != kind:
        return [f'is no longer a {_TYPES.get(kind, "file of this type")}']
    if saved.made_up or kind != stat.S_IFREG:
        return []
    words = []
    if found.st_ino != saved.inode:
        words.append(f'is another file (inode {found.st_ino}, not {saved.inode})')
    if found.st_size != saved.size:
        words.append(f'has {found.st_size:,} bytes, not {saved.size:,}')
    if max(found.st_mtime_ns, 0) != saved.mtime:
        words.append(f'was written at {_when(found.st_mtime_ns, saved.mtime)} (mtime)')
    return words


def _when(now: int, then: int) -> str:
    """Return 'A, not at B', in seconds unless both are in the same second."""
    if now // 10**9 != then // 10**9:
        return f'{_clock(now)}, not at {_clock(then)}'
    return f'{_clock(now)}.{now % 10**9:09}, not at {_clock(then)}.{then % 10**9:09}'


def _clock(nanoseconds: int) -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(nanoseconds // 10**9))
