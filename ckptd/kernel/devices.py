# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names of device drivers: /proc/devices and, for the minor numbers of the driver "misc", /proc/misc."""

import os
import stat
from functools import cache
from typing import NamedTuple

from ckptd.kernel.procfs import read_file, text

_MISC = 'misc'


class Drivers(NamedTuple):
    """Names by major number."""
    character: dict[int, str]
    block: dict[int, str]


def parse_devices(data: str) -> Drivers:
    """Parse /proc/devices: two lists with a heading each. Where drivers share a number, the first one counts."""
    found = Drivers({}, {})
    names = found.character
    for line in data.splitlines():
        words = line.split(maxsplit=1)
        if line.startswith('Block'):
            names = found.block
        elif len(words) == 2 and words[0].isdigit():
            names.setdefault(int(words[0]), words[1])
    return found


def parse_misc(data: str) -> dict[int, str]:
    """Parse /proc/misc: names by minor number."""
    return {int(number): name for number, name in (line.split(maxsplit=1) for line in data.splitlines())}


@cache
def _drivers() -> tuple[Drivers, dict[int, str]]:
    return parse_devices(text(read_file('/proc/devices'))), parse_misc(text(read_file('/proc/misc')))


def driver_of(mode: int, device: int) -> str:
    """Return the name of the driver of a device node; '' if the kernel does not tell. mode: st_mode."""
    try:
        drivers, misc = _drivers()
    except OSError:     # a sandbox may hide them
        return ''
    if stat.S_ISBLK(mode):
        return drivers.block.get(os.major(device), '')
    name = drivers.character.get(os.major(device), '')
    return misc.get(os.minor(device), name) if name == _MISC else name
