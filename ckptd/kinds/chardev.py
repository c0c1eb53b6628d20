# SPDX-License-Identifier: LGPL-2.1-or-later
"""The character devices that keep nothing: null, zero, full, random, urandom."""

import os
import stat

from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.kinds.base import Content, Kind, OpenFile

# Documentation/admin-guide/devices.txt
STATELESS = {os.makedev(1, 3): 'null', os.makedev(1, 5): 'zero', os.makedev(1, 7): 'full', os.makedev(1, 8): 'random',
             os.makedev(1, 9): 'urandom'}


@layout
class CharacterDevice(Struct):
    """device: its number, which says what it is whatever the path."""
    path: str
    device: U64
    mode: U32


class CharacterDeviceKind(Kind[CharacterDevice], tag='chardev'):

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISCHR(file.stat.st_mode) and file.stat.st_rdev in STATELESS and not file.is_path

    def dump(self, file: OpenFile, content: Content) -> CharacterDevice:
        return CharacterDevice(file.path, file.stat.st_rdev, file.stat.st_mode)
