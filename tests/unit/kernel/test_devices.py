# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/devices and /proc/misc."""

import os
import stat
from pathlib import Path

from ckptd.kernel.devices import driver_of, parse_devices, parse_misc

DEVICES = """Character devices:
  1 mem
  4 /dev/vc/0
  4 tty
 10 misc
116 alsa

Block devices:
  7 loop
259 blkext
"""
MISC = """235 autofs
200 tun
  1 psaux
"""


def test_devices() -> None:
    drivers = parse_devices(DEVICES)
    assert drivers.character == {1: 'mem', 4: '/dev/vc/0', 10: 'misc', 116: 'alsa'}
    assert drivers.block == {7: 'loop', 259: 'blkext'}


def test_misc() -> None:
    assert parse_misc(MISC) == {235: 'autofs', 200: 'tun', 1: 'psaux'}


def test_of_this_machine() -> None:
    null = Path('/dev/null').stat()
    assert driver_of(null.st_mode, null.st_rdev) == 'mem'
    assert driver_of(stat.S_IFCHR, os.makedev(4095, 0)) == ''
