# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cgroups of systemd's units (https://systemd.io/CGROUP_DELEGATION).

    ROOT/init.scope                                      the manager itself
    ROOT/system.slice/app.service                        a unit: below slices, which alone contain other units
    ROOT/system.slice/app.service/ssh.service            not a unit: app.service, to which it is delegated, named it
    ROOT/user.slice/user-1000.slice/user@1000.service    a unit of the system, and the ROOT of that user's manager
"""

import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ckptd.kernel.cgroup import CgroupMount
from ckptd.kernel.task import read_cgroup2

_MANAGER = 'init.scope'
_SLICE = '.slice'


def unit_directories(mount: CgroupMount, uid: int, unit: str) -> list[Path]:
    """Return the cgroup of a unit of uid 0's manager, which is the system's, or of another user's. Empty if the unit
    has none, or no such manager runs. There are several only if the unit moved to another slice and left processes
    behind."""
    try:
        root = system_root(mount)
    except FileNotFoundError:
        return []
    roots = [root] if uid == 0 else find_unit(root, f'user@{uid}.service')
    return [path for top in roots for path in find_unit(top, unit)]


def system_root(mount: CgroupMount) -> Path:
    """Return where the system's manager begins: above the init.scope of PID 1; in a container, at the container's
    cgroup. If PID 1 is in no init.scope (no systemd) or hidden (hidepid= of proc(5)), it is the top of the mount, where
    slices are made by root only. FileNotFoundError if the mount does not show it."""
    return mount.directory(_manager_cgroup())


def _manager_cgroup() -> str:
    try:
        path = PurePosixPath(read_cgroup2(1))
    except OSError:
        return '/'
    return str(path.parent) if path.name == _MANAGER else '/'


def find_unit(root: Path, unit: str) -> list[Path]:
    """Return the directories of this unit for the manager whose cgroup is `root`."""
    found: list[Path] = []
    slices = [root]
    while slices:
        directory = slices.pop()
        names = _children(directory)
        slices += [directory / name for name in names if name.endswith(_SLICE)]
        found += [directory / name for name in names if _unescaped(name) == unit]
    return sorted(found)


def units_of(cgroup: str, uid: int) -> tuple[str, ...]:
    """Return the units of uid 0's manager, or of another user's, that contain a cgroup: slices, and the unit in
    them."""
    root, path = PurePosixPath(_manager_cgroup()), PurePosixPath(cgroup)
    if not path.is_relative_to(root):
        return ()
    parts = path.relative_to(root).parts
    names = _units_in(parts)
    if uid == 0:
        return names
    return _units_in(parts[len(names):]) if names[-1:] == (f'user@{uid}.service',) else ()


def _units_in(parts: tuple[str, ...]) -> tuple[str, ...]:
    names: list[str] = []
    for part in parts:
        names.append(_unescaped(part))
        if not part.endswith(_SLICE):
            break
    return tuple(names)


def _children(directory: Path) -> list[str]:
    names: list[str] = []
    with suppress(OSError), os.scandir(directory) as entries:       # removed meanwhile, or not readable
        names += [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return names


def _unescaped(name: str) -> str:
    # '_' is added to a name that could be a file of the cgroup file system ('_memory.service', '_cgroup.slice') or
    # begins with '_' itself: cg_escape in systemd's src/basic/cgroup-util.c
    return name.removeprefix('_')
