# SPDX-License-Identifier: LGPL-2.1-or-later
"""Credentials of the calling thread: capabilities(7), and a permanent change to another user's credentials."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol

from ckptd.kernel.decl import c_int, c_uint, c_void_p, cstruct, libc, u32
from ckptd.kernel.prctl import PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, PR_SET_KEEPCAPS, prctl
from ckptd.kernel.procfs import read_file

# <linux/capability.h>, only those that ckptd uses
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_ADMIN = 12
CAP_IPC_LOCK = 14
CAP_SYS_RAWIO = 17
CAP_SYS_CHROOT = 18
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_SYS_NICE = 23
CAP_SYS_RESOURCE = 24
CAP_MKNOD = 27
CAP_LEASE = 28
CAP_AUDIT_CONTROL = 30
CAP_WAKE_ALARM = 35
CAP_BLOCK_SUSPEND = 36
CAP_CHECKPOINT_RESTORE = 40
LINUX_CAPABILITY_VERSION_3 = 0x20080522

# <linux/sched/coredump.h>
SUID_DUMP_DISABLE, SUID_DUMP_USER, SUID_DUMP_ROOT = 0, 1, 2

# <linux/capability.h>, in its order
_NAMES = (
    'chown', 'dac_override', 'dac_read_search', 'fowner', 'fsetid', 'kill', 'setgid', 'setuid',
    'setpcap', 'linux_immutable', 'net_bind_service', 'net_broadcast', 'net_admin', 'net_raw',
    'ipc_lock', 'ipc_owner', 'sys_module', 'sys_rawio', 'sys_chroot', 'sys_ptrace', 'sys_pacct',
    'sys_admin', 'sys_boot', 'sys_nice', 'sys_resource', 'sys_time', 'sys_tty_config', 'mknod', 'lease',
    'audit_write', 'audit_control', 'setfcap', 'mac_override', 'mac_admin', 'syslog', 'wake_alarm',
    'block_suspend', 'audit_read', 'perfmon', 'bpf', 'checkpoint_restore')
_LOW = 0xFFFFFFFF


@cstruct(size=8)
class cap_user_header(ctypes.Structure):
    """struct __user_cap_header_struct of <linux/capability.h>"""
    version: u32
    pid: c_int


@cstruct(size=12)
class cap_user_data(ctypes.Structure):
    """struct __user_cap_data_struct: one 32-bit half of each set"""
    effective: u32
    permitted: u32
    inheritable: u32


@libc
def _capget(header: c_void_p, data: c_void_p) -> c_int: ...


@libc
def _capset(header: c_void_p, data: c_void_p) -> c_int: ...


@libc
def setfsuid(fsuid: c_uint) -> c_uint:
    """Set the uid for file access and return the previous one (setfsuid(2))."""


@libc
def setfsgid(fsgid: c_uint) -> c_uint:
    """Set the gid for file access and return the previous one (setfsgid(2))."""


class Capabilities(NamedTuple):
    """Three capability sets as masks: bit n is capability n."""
    effective: int
    permitted: int
    inheritable: int


def capget(pid: int = 0) -> Capabilities:
    """Read the sets of a thread, 0 for the calling one."""
    header = cap_user_header(LINUX_CAPABILITY_VERSION_3, pid)
    low, high = data = (cap_user_data * 2)()
    _capget(ctypes.byref(header), data)
    return Capabilities(low.effective | high.effective << 32, low.permitted | high.permitted << 32,
                        low.inheritable | high.inheritable << 32)


def capset(capabilities: Capabilities) -> None:
    """Set the sets of the calling thread, and of no other thread of the process."""
    header = cap_user_header(LINUX_CAPABILITY_VERSION_3, 0)
    data = (cap_user_data * 2)(cap_user_data(*[mask & _LOW for mask in capabilities]),
                               cap_user_data(*[mask >> 32 for mask in capabilities]))
    _capset(ctypes.byref(header), data)


def set_keepcaps(keep: bool) -> None:
    """Choose whether leaving uid 0 keeps the permitted set. execve(2) turns this off (PR_SET_KEEPCAPS(2const))."""
    prctl(PR_SET_KEEPCAPS, int(keep))


class UserIds(Protocol):
    """The ids of a user."""
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def groups(self) -> Sequence[int]: ...


def become(uid: int, gid: int, groups: Sequence[int], capabilities_mask: int) -> None:
    """Take these ids, and keep only those permitted capabilities that are in the mask. This cannot be undone.

    For a freshly forked child: capabilities belong to one thread, ids to all. PermissionError if the ids are not the
    caller's and it lacks CAP_SETUID or CAP_SETGID. The changes made until then remain, so exit.
    """
    if capabilities_mask < 0:
        raise ValueError('a capability mask is not negative; unknown is not all')
    set_keepcaps(True)
    _set_ids(uid, gid, groups)
    kept = capget().permitted & capabilities_mask
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    capset(Capabilities(effective=kept, permitted=kept, inheritable=0))
    set_keepcaps(False)


def give_up_capability(number: int) -> None:
    """Drop a capability from all sets of the calling thread. It cannot be regained."""
    held = capget()
    capset(Capabilities(*(mask & ~(1 << number) for mask in held)))


def _set_ids(uid: int, gid: int, groups: Sequence[int]) -> None:
    # setgroups(2) requires CAP_SETGID even if nothing would change, and an ordinary user has no such capability
    if set(os.getgroups()) != set(groups):
        os.setgroups(groups)
    if os.getresgid() != (gid, gid, gid):
        os.setresgid(gid, gid, gid)
    if os.getresuid() != (uid, uid, uid):
        os.setresuid(uid, uid, uid)


@contextmanager
def file_rights(uid: int, gid: int, groups: Sequence[int], capabilities: int = 0) -> Iterator[None]:
    """Look up and make files as that user in this block, with only the given capabilities. If the user is our own,
    nothing changes. For a process of one thread, because groups are those of all threads.

    Changing the file-system uid drops only the capabilities for file permissions (capabilities(7), "Effect of user ID
    changes on capabilities"). CAP_SYS_PTRACE would lead through /proc/PID/cwd past every directory above it. A file can
    use its opener's capabilities for as long as it is open: /proc/kallsyms uses CAP_SYSLOG.
    """
    if uid == os.geteuid():
        yield
        return
    groups_before, before = os.getgroups(), capget()
    os.setgroups(groups)
    try:
        setfsgid(gid)
        setfsuid(uid)
        capset(before._replace(effective=capget().effective & capabilities))
        yield
    finally:
        # returning to our own ids needs no capability (setfsuid(2))
        setfsuid(os.geteuid())
        setfsgid(os.getegid())
        capset(before)
        os.setgroups(groups_before)


@contextmanager
def no_capabilities() -> Iterator[None]:
    """Run this block with only the rights of this thread's ids."""
    before = capget()
    capset(before._replace(effective=0))
    try:
        yield
    finally:
        capset(before)


@cache
def last_capability() -> int:
    """Return the highest capability of this kernel."""
    return int(read_file('/proc/sys/kernel/cap_last_cap'))


def capability_names(mask: int) -> str:
    """'CAP_SYS_NICE, CAP_SYS_TIME'."""
    return ', '.join(f'CAP_{_NAMES[bit].upper()}' if bit < len(_NAMES) else f'capability {bit}'
                     for bit in range(64) if mask >> bit & 1)
