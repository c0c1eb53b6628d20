# SPDX-License-Identifier: LGPL-2.1-or-later
"""mountinfo."""

import os
from pathlib import Path

import psutil

from ckptd.kernel.mountinfo import Mount, parse_mountinfo, read_mountinfo

CAPTURED = (
    b'36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue\n'
    b'41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n'
    b'50 36 0:44 /a\\040b /with\\040blank\\011tab\\012newline\\134back\\043hash rw shared:9'
    b' - fuse.x so\\040urce rw,user_id=0\n'
    b'51 36 0:45 / /none rw - tmpfs  rw\n')


def test_captured() -> None:
    mounts = parse_mountinfo(CAPTURED)
    assert mounts[0] == Mount(36, 35, 98, 0, '/mnt1', '/mnt2', ('rw', 'noatime'), 'ext3', '/dev/root',
                              ('rw', 'errors=continue'))
    assert (mounts[1].fs_type, mounts[1].mount_point) == ('cgroup2', '/sys/fs/cgroup/unified')
    assert mounts[2].mount_point == '/with blank\ttab\nnewline\\back#hash'
    assert (mounts[2].root, mounts[2].source, mounts[2].fs_type) == ('/a b', 'so urce', 'fuse.x')
    assert (mounts[3].source, mounts[3].super_options) == ('', ('rw',))     # tmpfs may be mounted from nothing


def test_our_own_as_psutil_and_stat_have_them() -> None:
    before: list[Mount] = []
    while (mounts := read_mountinfo()) != before:       # others may mount at any time
        before = mounts
        of_pid = read_mountinfo(os.getpid())
        theirs = {(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)}
    assert of_pid == mounts
    assert {(mount.mount_point, mount.fs_type) for mount in mounts} == theirs
    proc = next(mount for mount in reversed(mounts) if mount.mount_point == '/proc')
    assert os.makedev(proc.major, proc.minor) == Path('/proc').stat().st_dev
