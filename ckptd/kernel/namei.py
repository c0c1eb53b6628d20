# SPDX-License-Identifier: LGPL-2.1-or-later
"""Resolve paths that /proc shows of another task."""

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
    """Open a file and return a new fd (openat2(2), since 5.6)."""


def open_direct(path: str, flags: int, mode: int = 0) -> int:
    """Open a path that has no symbolic link in it, as open(2) does; else ELOOP. Close-on-exec."""
    return _open(path, flags, mode, RESOLVE_NO_SYMLINKS)


def open_plain(path: str, flags: int, mode: int = 0) -> int:
    """Open a path that has no magic link in it (/proc/PID/fd/N or cwd), as open(2) does; else ELOOP. Close-on-exec."""
    return _open(path, flags, mode, RESOLVE_NO_MAGICLINKS)


def open_below(root: int, path: str, flags: int) -> int:
    """Open a path below the directory `root`. ELOOP if it has a symbolic link. The fd is close-on-exec."""
    return _open(path.lstrip('/') or '.', flags, 0, RESOLVE_NO_SYMLINKS, root)


def _open(path: str, flags: int, mode: int, resolve: int, at: int = AT_FDCWD) -> int:
    name = os.fsencode(path)
    if b'\0' in name:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if flags & os.O_PATH:       # openat2(2) rejects flags that open(2) ignores
        flags &= _WITH_PATH
    how = open_how(flags | os.O_CLOEXEC, mode, resolve)
    try:
        return openat2(at, name, ctypes.byref(how), ctypes.sizeof(how))
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO), path) from None


def lstat_of_task(tid: int, path: str) -> os.stat_result | None:
    """Return lstat(2) of an absolute path, taken from a link or map of task `tid`, as the task sees it. None if there
    is nothing, or nothing that we may see.

    d_path() in fs/d_path.c goes up to the reader's root or, in another mount namespace, to the root of that namespace.
    So a chroot of the task is part of the path if we share its mount namespace; otherwise its root link leads there.
    """
    try:
        return Path(root_of_task(tid) + path).lstat()
    except (OSError, ValueError):
        return None


def root_of_task(tid: int) -> str:
    """Return the prefix that makes an absolute path of a link or map of task `tid` lead to its file, '' for none."""
    return '' if _mount_namespace('self') == _mount_namespace(str(tid)) else f'/proc/{tid}/root'


def has_known_mounts(tid: int) -> bool:
    """Return whether a task has our mount namespace, or that of the first process if we may read it."""
    return _mount_namespace(str(tid)) in (_mount_namespace('self'), _mount_namespace('1') or _mount_namespace(str(tid)))


def _mount_namespace(task: str) -> str:
    try:
        return os.readlink(f'/proc/{task}/ns/mnt')  # noqa: PTH115
    except OSError:
        return ''
