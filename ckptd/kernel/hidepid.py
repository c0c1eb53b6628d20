# SPDX-License-Identifier: LGPL-2.1-or-later
"""Visibility of other users' processes in /proc: the mount options hidepid= and gid= (proc(5))."""

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
    """The options of one mount.

    Level 1: entries of other users are listed and cannot be read. Level 2: they are not listed either. Members of the
    group gid are exempt from both. Level 4: only processes that the reader may trace are listed, with no exempt group.
    """
    level: int
    gid: int = 0

    def concerns(self, groups: Collection[int]) -> bool:
        """Whether a process in these groups sees only processes that it may trace (fs/proc/base.c,
        has_pid_permissions)."""
        return self.level >= NOT_PTRACEABLE or (self.level > 0 and self.gid not in groups)


def parse_hiding(mounts: Sequence[Mount]) -> Hiding:
    """Return the options of the topmost mount at /proc. If that is not a proc file system, no process is visible."""
    top = next((mount for mount in reversed(mounts) if mount.mount_point == PROC), None)
    if top is None or top.fs_type != 'proc':
        return Hiding(NOT_PTRACEABLE)
    options = dict(option.partition('=')[::2] for option in top.super_options)
    level = options.get('hidepid', 'off')
    return Hiding(_LEVELS[level] if level in _LEVELS else int(level), int(options.get('gid', 0)))


def is_hidden_from(groups: Collection[int], pid: int, start_time: int) -> bool:
    """Whether the kernel hides other users' processes from a process in these groups, which include its gid.
    start_time: of the process, as for `held`. Its own /proc is ignored if it is gone or may not be inspected.

    Three mounts of /proc count: that of the process, ours, and that of process 1. A service may have a /proc that hides
    more than that of the machine (systemd.exec(5), ProtectProc=), and ckptd may be such a service.
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
    """Whether a process exists that this /proc hides: it belongs to another user or is not dumpable."""
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
