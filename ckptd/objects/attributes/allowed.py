# SPDX-License-Identifier: LGPL-2.1-or-later
"""Resource limits that a restart may set, and their consequences: those of the image, or the nearest.

If the two differ, a restart is refused unless its caller accepts the nearest (clamp).
"""

import functools
from collections.abc import Iterable, Sequence

from ckptd.image.reader import ImageReader
from ckptd.image.records import Limit, Limits, Vma
from ckptd.kernel.creds import CAP_IPC_LOCK, CAP_SYS_RESOURCE, capget
from ckptd.kernel.prlimit import read_limit
from ckptd.kernel.procfs import read_file

# <asm-generic/resource.h>
NOFILE, MEMLOCK, NICE, RTPRIO = 7, 8, 13, 14
LIMITS = 16
INFINITY = (1 << 64) - 1


class Allowed:
    """The values that we may set. hard_limits: those of the calling process by RLIMIT_* number, if they bind the tree
    and not us."""

    def __init__(self, reader: ImageReader, hard_limits: Sequence[int]) -> None:
        self._reader, self._hard_limits = reader, hard_limits
        self._capabilities = capget().effective
        self._limits: dict[int, tuple[Limit, ...]] = {}
        self._most = tuple(self._highest(number) for number in range(LIMITS))

    def may(self, capability: int) -> bool:
        return bool(self._capabilities >> capability & 1)

    def limits(self, vpid: int) -> tuple[Limit, ...]:
        """Return the limits of a process, by number."""
        if vpid not in self._limits:
            wanted = self._reader.get(Limits, vpid).limits
            self._limits[vpid] = tuple(map(_nearest, wanted, self._most))
        return self._limits[vpid]

    def _highest(self, number: int) -> int:
        """Return the highest hard limit that we may set."""
        if self.may(CAP_SYS_RESOURCE):
            most = INFINITY
        else:
            most = read_limit(0, number)[1]
            most = min(most, self._hard_limits[number]) if number < len(self._hard_limits) else most
        return min(most, nr_open()) if number == NOFILE else most

    def lockable(self, vpid: int) -> int:
        """Return the bytes that a process may lock."""
        return INFINITY if self.may(CAP_IPC_LOCK) else self.limits(vpid)[MEMLOCK].soft

    def locked(self, vpid: int, vmas: Iterable[Vma]) -> frozenset[int]:
        """Return the start addresses of the locked mappings: from the lowest on, as many as the limit allows."""
        room, starts = self.lockable(vpid), []
        for vma in vmas:
            if vma.locked and vma.end - vma.start <= room:
                room -= vma.end - vma.start
                starts.append(vma.start)
        return frozenset(starts)


def _nearest(wanted: Limit, most: int) -> Limit:
    return wanted if wanted.hard <= most else Limit(min(wanted.soft, most), most)


@functools.cache
def nr_open() -> int:
    """Return the sysctl fs.nr_open: the maximum of RLIMIT_NOFILE for everyone (kernel/sys.c, do_prlimit)."""
    return int(read_file('/proc/sys/fs/nr_open'))
