# SPDX-License-Identifier: LGPL-2.1-or-later
"""A signalfd: a set of signals to read (signalfd(2)). Pending signals belong to the reader, not to the file."""

import ctypes
import os

from ckptd.image.grammar import U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.signalfd import SFD_CLOEXEC, SIGSET_SIZE, signalfd
from ckptd.objects.files.base import Content, Kind, OpenFile, RestoreContext
from ckptd.objects.support import Support

_LINK = 'anon_inode:[signalfd]'


@layout
class Signalfd(Struct):
    """A signalfd. mask: bit n-1 for signal n."""
    mask: U64


class SignalfdKind(Kind[Signalfd], tag='signalfd'):
    support = Support('signals as files (signalfd)')

    def matches(self, file: OpenFile) -> bool:
        return file.link == _LINK and not file.is_path

    def dump(self, file: OpenFile, content: Content) -> Signalfd:
        return Signalfd(int(file.info.fields['sigmask'][0], 16))

    def create(self, record: Signalfd, saved: SavedFile, ctx: RestoreContext) -> int:
        mask = ctypes.create_string_buffer(record.mask.to_bytes(8, 'little'), SIGSET_SIZE)
        return signalfd(-1, mask, SFD_CLOEXEC | saved.flags & os.O_NONBLOCK)
