# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a file is still the one that an image speaks of, and how it is not. Pure: what was, against a stat."""

import os
import stat
import time
from typing import NamedTuple

from ckptd.image.records import Backing

MISSING = 'is missing'
_TYPES = {stat.S_IFREG: 'regular file', stat.S_IFDIR: 'directory', stat.S_IFCHR: 'character device',
          stat.S_IFBLK: 'block device', stat.S_IFIFO: 'FIFO', stat.S_IFSOCK: 'socket', stat.S_IFLNK: 'link'}


class FileIdentity(NamedTuple):
    """What an image keeps of a file. mode: st_mode. mtime: nanoseconds. A device number is not in it: it changes from
    boot to boot. made_up: the file system makes the content, so that size, time and inode say nothing."""
    mode: int
    inode: int
    size: int
    mtime: int
    made_up: bool = False

    @classmethod
    def of_backing(cls, backing: Backing) -> 'FileIdentity':
        return cls(backing.mode, backing.inode, backing.size, backing.mtime)


def changes(saved: FileIdentity, found: os.stat_result | None) -> list[str]:
    """Each way in which the file differs, as words that follow its name; empty if it is the same.

    'is missing' | 'is no regular file any more' | 'is another file (inode 7, not 5)' | 'has 9,000 bytes, not 5,000' |
    'was written at 2026-01-02 03:04:05, not at 2026-01-01 00:00:00 (mtime)'
    """
    if found is None:
        return [MISSING]
    kind = stat.S_IFMT(saved.mode)
    if stat.S_IFMT(found.st_mode) != kind:
        return [f'is no {_TYPES.get(kind, "such file")} any more']
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
    """'A, not at B', to the second unless they are of the same one."""
    if now // 10**9 != then // 10**9:
        return f'{_clock(now)}, not at {_clock(then)}'
    return f'{_clock(now)}.{now % 10**9:09}, not at {_clock(then)}.{then % 10**9:09}'


def _clock(nanoseconds: int) -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(nanoseconds // 10**9))
