# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces as files (ioctl_nsfs(2)): the id of a namespace, which is not used again before the next boot. Its inode
number is: the next namespace that is made may have it."""

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from fcntl import ioctl
from functools import cache
from typing import NamedTuple

from ckptd.kernel.decl import IOR
from ckptd.kernel.procfs import task_dir
from ckptd.kernel.stat import PF_KTHREAD, read_stat
from ckptd.kernel.task import read_namespaces

# <linux/nsfs.h>, since Linux 6.18
NS_GET_ID = IOR('\xb7', 13, 8)
_KTHREADD = 2


class NamespaceId(NamedTuple):
    """id: 0 where the kernel does not tell it."""
    inode: int
    id: int


def read_namespace_ids(pid: int) -> dict[str, NamespaceId]:
    """Return the namespaces of a process by the name of the link ('net', 'pid_for_children' ...).

    PermissionError without PTRACE_MODE_READ access.
    """
    links = read_namespaces(pid)
    ids = _read_ids(pid, links)
    return {name: NamespaceId(inode, ids.get(name, 0)) for name, inode in links.items()}


def _read_ids(pid: int, names: Iterable[str]) -> dict[str, int]:
    found = {}
    for name in names:
        # a link vanishes with the process, and an older kernel does not know the request
        with suppress(FileNotFoundError, ProcessLookupError):
            fd = os.open(f'{task_dir(pid)}/ns/{name}', os.O_RDONLY | os.O_CLOEXEC)
            try:
                found[name] = int.from_bytes(ioctl(fd, NS_GET_ID, bytes(8)), 'little')
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
            finally:
                os.close(fd)
    return found


@cache
def machine_namespaces() -> dict[str, NamespaceId]:
    """Return the namespaces of process 1, which does not leave them. If a security module or hidepid=4 hides them,
    return those of the kernel's own threads; otherwise none. The answer is kept, because a process that becomes an
    ordinary user can read them no more."""
    with suppress(OSError):
        return read_namespace_ids(1)
    with suppress(OSError):
        if read_stat(_KTHREADD).flags & PF_KTHREAD:
            return read_namespace_ids(_KTHREADD)
    return {}
