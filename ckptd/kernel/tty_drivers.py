# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drivers of terminals, /proc/tty/drivers."""

import functools
import os
from typing import NamedTuple

from ckptd.kernel.procfs import read_file


class Driver(NamedTuple):
    """A driver. kind: 'pty:slave', 'console', 'serial' ..."""
    major: int
    minors: range
    kind: str


@functools.cache
def _drivers() -> tuple[Driver, ...]:
    return parse_drivers(read_file('/proc/tty/drivers'))


def parse_drivers(data: bytes) -> tuple[Driver, ...]:
    """Parse lines 'pty_slave  /dev/pts  136 0-1048575 pty:slave', without the masters."""
    found = []
    for line in data.decode().splitlines():
        _, _, major, minors, kind = line.split()
        first, _, last = minors.partition('-')
        if kind not in ('pty:master', 'system:/dev/ptmx') and int(major) >= 0:
            found.append(Driver(int(major), range(int(first), int(last or first) + 1), kind))
    return tuple(found)


def driver_of(device: int) -> str:
    """Return the type of the driver of a terminal; '' for another device."""
    major, minor = os.major(device), os.minor(device)
    return next((driver.kind for driver in _drivers() if major == driver.major and minor in driver.minors), '')
