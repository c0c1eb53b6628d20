# SPDX-License-Identifier: LGPL-2.1-or-later
"""Paths that /proc shows of another task, and what they lead to."""

import ctypes
import os
from pathlib import Path

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_long, c_size_t, c_void_p, cstruct, syscall, u64

AT_FDCWD = -100                 # <linux/fcntl.h>
RESOLVE_NO_SYMLINKS = 4         # <linux/openat2.h>


@cstruct(size=24)
class open_how(ctypes.Structure):
    """struct open_how of <linux/openat2.h>"""
    flags: u64
    mode: u64
    resolve: u64


@syscall(NR['openat2'])
def openat2(dirfd: c_int, path: c_void_p, how: c_void_p, size: c_size_t) -> c_long:
    """A new fd, openat2(2), since 5.6."""


def open_direct(path: str, flags: int, mode: int = 0) -> int:
    """open(2) of a path that has no symbolic link in it; else ELOOP. Close-on-exec."""
    how = open_how(flags | os.O_CLOEXEC, mode, RESOLVE_NO_SYMLINKS)
    return openat2(AT_FDCWD, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))


def lstat_of_task(tid: int, path: str) -> os.stat_result | None:
    """What an absolute path from a link or map of task `tid` names there; None if nothing, or nothing we may see.

    d_path() in fs/d_path.c goes up to the reader's root or, in another mount namespace, to the root of that one; so a
    chroot of the task is in the path when we share its mount namespace, and its root leads there when we do not.
    """
    prefix = '' if _mount_namespace('self') == _mount_namespace(str(tid)) else f'/proc/{tid}/root'
    try:
        return Path(prefix + path).lstat()
    except (OSError, ValueError):
        return None


def _mount_namespace(task: str) -> str:
    try:
        return os.readlink(f'/proc/{task}/ns/mnt')  # noqa: PTH115
    except OSError:
        return ''
