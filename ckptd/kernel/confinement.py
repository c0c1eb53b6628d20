# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restrictions that a process has put on itself and its descendants for good, compared with those of another process.

Landlock is not visible anywhere, but it requires no_new_privs or CAP_SYS_ADMIN. A process with CAP_SYS_ADMIN is not
confined by the other means either.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from ckptd.kernel.stat import PF_KTHREAD, read_stat
from ckptd.kernel.status import Status, read_status
from ckptd.kernel.task import read_namespaces

# in the order in which they are listed to users; a time namespace shows other clocks and denies nothing
NAMESPACES: Final = {'user': 'user', 'mnt': 'mount', 'pid': 'pid', 'net': 'network', 'uts': 'UTS', 'ipc': 'IPC',
                     'cgroup': 'cgroup'}
NO_NEW_PRIVS: Final = 'no_new_privs'
SECCOMP: Final = 'a seccomp filter'
PID_NAMESPACE: Final = 'a pid namespace of its own'
UNKNOWN: Final = ('unknown restrictions (it has ended)',)      # of a process that is gone
_KTHREADD: Final = 2


class Restrictions(NamedTuple):
    """The restrictions of a process."""
    no_new_privs: bool
    seccomp: int                     # 0 off, 1 strict, 2 filter
    filters: int                     # number of seccomp filters, 0 where the kernel does not count
    bounding: int                    # capability bounding set, a mask
    namespaces: Mapping[str, int]    # inode by name, as far as known


def restrictions_of(status: Status, namespaces: Mapping[str, int]) -> Restrictions:
    return Restrictions(status.no_new_privs, status.seccomp, status.seccomp_filters, status.cap_bnd, namespaces)


def own_restrictions() -> Restrictions:
    """Read the restrictions of the calling process."""
    return restrictions_of(read_status(os.getpid()), read_namespaces(os.getpid()))


def machine_restrictions() -> Restrictions:
    """Read the restrictions of process 1, which every process of this pid namespace begins with. If a security module
    or hidepid=4 hides its namespaces, use those of the kernel's own threads, and then ours."""
    try:
        status = read_status(1)
    except OSError:
        status = read_status(os.getpid())
    return restrictions_of(status, _machine_namespaces())


def _machine_namespaces() -> Mapping[str, int]:
    with suppress(OSError):
        return read_namespaces(1)
    with suppress(OSError):
        if read_stat(_KTHREADD).flags & PF_KTHREAD:
            return read_namespaces(_KTHREADD)
    return read_namespaces(os.getpid())


def confinement(of: Restrictions, base: Restrictions) -> tuple[str, ...]:
    """List what confines a process beyond `base`, as phrases that follow 'confined by'. Empty for nothing."""
    found = []
    if of.no_new_privs and not base.no_new_privs:
        found.append(NO_NEW_PRIVS)
    if of.seccomp and (of.seccomp != base.seccomp or of.filters > base.filters):
        found.append(SECCOMP)
    if base.bounding & ~of.bounding:
        found.append('a reduced capability bounding set')
    found += [f'a {word} namespace of its own' for name, word in NAMESPACES.items()
              if of.namespaces.get(name, 0) != base.namespaces.get(name, 0)]
    return tuple(found)


def listed(confined: Sequence[str]) -> str:
    """Join phrases to 'a, b and c', which follows 'confined by'."""
    return ' and '.join(filter(None, (', '.join(confined[:-1]), confined[-1])))


def hint_for(confined: Sequence[str]) -> str:
    """Return a hint for a confined caller."""
    if tuple(confined) == UNKNOWN:
        return 'call again, and stay until the answer'
    return 'call from outside of the sandbox (in a unit: ExecStop=+), or about processes that the caller started'
