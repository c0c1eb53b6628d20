# SPDX-License-Identifier: LGPL-2.1-or-later
"""An eventfd: a 64-bit counter (eventfd(2)). fdinfo shows all of it, so the task is not asked."""

import os

from ckptd.errors import Finding
from ckptd.image.grammar import U8, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.objects.files.base import Content, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.support import Support

EVENTFD_LINK = 'anon_inode:[eventfd]'
_COUNT, _SEMAPHORE = 'eventfd-count', 'eventfd-semaphore'


@layout
class Eventfd(Struct):
    """An eventfd. semaphore: EFD_SEMAPHORE, a read takes 1."""
    count: U64
    semaphore: U8


class EventfdKind(Kind[Eventfd], tag='eventfd'):
    support = Support('counters (eventfd)', warned='EFD_SEMAPHORE, before Linux 6.5')

    def matches(self, file: OpenFile) -> bool:
        return file.link == EVENTFD_LINK and not file.is_path

    def findings(self, file: OpenFile) -> list[Finding]:
        if _SEMAPHORE in file.info.fields:
            return []
        return [finding('ENODATA', 'the kernel does not tell whether an eventfd is a semaphore',
                        'a restart treats it as a counter; use Linux 6.5 or newer', 'warning')]

    def dump(self, file: OpenFile, content: Content) -> Eventfd:
        fields = file.info.fields
        # eventfd_show_fdinfo in fs/eventfd.c: the count is hexadecimal
        return Eventfd(int(fields[_COUNT][0], 16), int(fields.get(_SEMAPHORE, ['0'])[0]))

    def create(self, record: Eventfd, saved: SavedFile, ctx: RestoreContext) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | saved.flags & os.O_NONBLOCK | (os.EFD_SEMAPHORE if record.semaphore else 0))
        if record.count:        # the initial value has 32 bits only
            os.eventfd_write(fd, record.count)
        return fd
