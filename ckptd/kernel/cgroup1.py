# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hierarchies of cgroup v1 that limit resources on a hybrid machine (cgroups(7))."""

import errno
import os
from pathlib import Path
from typing import NamedTuple

from ckptd.kernel.cgroup import CgroupMount
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.procfs import read_task_file, task_dir, text


class Cgroup1Path(NamedTuple):
    """A cgroup of one hierarchy. controllers: the hierarchy's name in /proc/PID/cgroup, 'memory' or 'cpu,cpuacct'."""
    controllers: str
    path: str


def read_places(pid: int) -> tuple[Cgroup1Path, ...]:
    """Read the cgroup of a process in each hierarchy that limits resources. The freezer and named hierarchies do
    not."""
    found = []
    for line in text(read_task_file(task_dir(pid), 'cgroup')).splitlines():
        number, controllers, path = line.split(':', 2)
        if number != '0' and not controllers.startswith('name=') and 'freezer' not in controllers.split(','):
            found.append(Cgroup1Path(controllers, path))
    return tuple(found)


def join(places: tuple[Cgroup1Path, ...]) -> None:
    """Move the calling process to these cgroups. OSError; FileNotFoundError if one is gone or not visible from here."""
    own = read_places(os.getpid())
    mounts = [mount for mount in read_mountinfo() if mount.fs_type == 'cgroup']
    for place in places:
        if place in own:
            continue
        wanted = set(place.controllers.split(','))
        for mount in mounts:
            if wanted <= set(mount.super_options):
                directory = CgroupMount(Path(mount.mount_point), mount.root).directory(place.path)
                (directory / 'cgroup.procs').write_text('0')
                break
        else:
            raise FileNotFoundError(errno.ENOENT, f'no cgroup hierarchy of {place.controllers} is mounted', place.path)
