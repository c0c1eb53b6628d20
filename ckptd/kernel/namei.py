# SPDX-License-Identifier: LGPL-2.1-or-later
"""Paths that /proc shows of another task, and what they lead to."""

import ctypes
import errno
import os
from pathlib import Path

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_long, c_size_t, c_void_p, cstruct, syscall, u64

AT_FDCWD = -100                 # <linux/fcntl.h>
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 2, 4      # <linux/openat2.h>
_WITH_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


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
    return _open(path, flags, mode, RESOLVE_NO_SYMLINKS)


def open_plain(path: str, flags: int, mode: int = 0) -> int:
    """open(2) of a path that has no link of the kernel's own in it, /proc/PID/fd/N or cwd; else ELOOP. Close-on-exec.
    """
    return _open(path, flags, mode, RESOLVE_NO_MAGICLINKS)


def _open(path: str, flags: int, mode: int, resolve: int) -> int:
    name = os.fsencode(path)
    if b'\0' in name:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if flags & os.O_PATH:       # openat2(2) refuses what open(2) ignores
        flags &= _WITH_PATH
    how = open_how(flags | os.O_CLOEXEC, mode, resolve)
    try:
        return openat2(AT_FDCWD, name, ctypes.byref(how), ctypes.sizeof(how))
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO), path) from None


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
