# SPDX-License-Identifier: LGPL-2.1-or-later
"""From whom /proc hides the processes of others: its mount options hidepid= and gid=, proc(5)."""

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import NamedTuple

from ckptd.kernel.mountinfo import Mount, read_mountinfo
from ckptd.kernel.pidfd import held, pidfd_open, wait_dead
from ckptd.kernel.stat import read_stat

PROC = '/proc'
# enum proc_hidepid of <linux/proc_fs.h>; mountinfo has names since 5.8 and had numbers before
_LEVELS = {'off': 0, 'noaccess': 1, 'invisible': 2, 'ptraceable': 4}
NOT_PTRACEABLE = 4


class Hiding(NamedTuple):
    """The options of one mount. At level 1 the entries of others are listed and cannot be read, at 2 they are not
    listed either; members of the group gid are exempt from both. At level 4 nobody is."""
    level: int
    gid: int = 0

    def concerns(self, groups: Collection[int]) -> bool:
        """Whether a process in these groups sees no more than what it may trace (fs/proc/base.c,
        has_pid_permissions)."""
        return self.level >= NOT_PTRACEABLE or (self.level > 0 and self.gid not in groups)


def parse_hiding(mounts: Sequence[Mount]) -> Hiding:
    """The options of what is on top at /proc. Where that is no proc file system, no process can be seen at all."""
    top = next((mount for mount in reversed(mounts) if mount.mount_point == PROC), None)
    if top is None or top.fs_type != 'proc':
        return Hiding(NOT_PTRACEABLE)
    options = dict(option.partition('=')[::2] for option in top.super_options)
    level = options.get('hidepid', 'off')
    return Hiding(_LEVELS[level] if level in _LEVELS else int(level), int(options.get('gid', 0)))


def is_hidden_from(groups: Collection[int], pid: int, start_time: int) -> bool:
    """Whether the kernel hides processes of others from a process in these groups. groups: with its gid. start_time:
    of the process, as of `held`; of one that is gone, or that we may not look at, its own /proc does not count.

    The own /proc of the process counts, ours, and that of process 1: a service may have one that hides more than that
    of the machine (systemd.exec(5), ProtectProc=), and ckptd may be such a service.
    """
    with suppress(OSError), held(pid, start_time):
        theirs = parse_hiding(read_mountinfo(pid))
        if theirs.concerns(groups):
            return True
    with suppress(OSError):
        if parse_hiding(read_mountinfo(1)).concerns(groups):
            return True
    return parse_hiding(read_mountinfo()).concerns(groups)


def is_hidden(pid: int) -> bool:
    """Whether a process lives that /proc does not show us, of another user or not dumpable."""
    try:
        read_stat(pid)
    except PermissionError:
        return True
    except ProcessLookupError:
        try:
            fd = pidfd_open(pid)
        except OSError:
            return False
        try:
            return not wait_dead(fd, 0)
        finally:
            os.close(fd)
    return False
