# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ring of a context of asynchronous I/O (io_setup(2)). objects/attributes/asynchronous_io.py tells whether requests
are running.

The kernel has its own tail, which only completions move, and counts those that the program has not read. So a restart
submits requests that are done at once: as many as the head says, which are read, then as many as there are completions
that the program has not read. Then the content of the ring is put in place, without the number in its first word, by
which the kernel finds the context.
"""

import os
from collections.abc import Iterator

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.reader import ImageReader, Memory
from ckptd.image.records import AIO, Vma
from ckptd.kernel.aio import (
    EVENT_SIZE,
    RING_NAME,
    RingHeader,
    empty_read,
    parse_ring_header,
    possible_processors,
    requests_for,
    ring_size,
)
from ckptd.kernel.maps import Mapping
from ckptd.kernel.memory import Mem
from ckptd.objects.attributes.base import about
from ckptd.objects.files.base import finding
from ckptd.objects.mappings.base import RELEASE, MappedSpace, MappingCheck, MappingMeans, PrivateMemoryKind, label
from ckptd.objects.support import Support
from ckptd.remote.script import Script

_AT_ONCE = 64       # requests of one call
_LARGEST = 1 << 24  # bytes of a ring: fs.aio-max-nr is 65,536 by default
_NUMBER_SIZE = 4    # struct aio_ring


class AioRingMapping(PrivateMemoryKind, numbers=[AIO], names=[RING_NAME]):
    """A ring. Its address is the name of its context."""
    support = Support('rings of asynchronous I/O (io_setup)',
                      refused='rings that are not mapped whole and writable; a restart on a machine with many more '
                              'processors')
    is_special = True
    is_placed = True
    keeps_all_pages = True

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        if mapping.offset or not mapping.write:
            return finding('EOPNOTSUPP', 'a ring of asynchronous I/O that is not mapped whole and writable', RELEASE)
        return None

    # ------------------------------------------------------------ restart

    def restart_findings(self, context: MappingCheck) -> Iterator[Finding]:
        processors = len(possible_processors())
        for vma in context.reader.every(Vma):
            size = vma.end - vma.start
            if vma.kind == AIO and size <= _LARGEST and ring_size(requests_for(size), processors) != size:
                yield about(context.mm_users.get(vma.mm_id, 0), 'AIO', 'EOPNOTSUPP', 'its ring of asynchronous I/O is '
                            f'smaller than this machine with {processors} possible processors makes any',
                            'restore it on a machine with as many processors as it was dumped on')

    def open(self, vma: Vma, means: MappingMeans) -> int:
        """Open a file from which nothing is read. It need not be there in the file system."""
        return means.files.once('aio', lambda: os.eventfd(0, os.EFD_CLOEXEC))

    def map(self, vma: Vma, protection: int, script: Script, space: MappedSpace) -> None:
        header, fd = _header(space.means.reader, space.memory, vma), self.open(vma, space.means)
        script.call('io_setup', requests_for(vma.end - vma.start), bytes(8), about=label(vma))
        for done in range(0, header.head, _AT_ONCE):
            count = min(_AT_ONCE, header.head - done)
            _submit(script, vma, fd, count)
            script.call('io_getevents', vma.start, count, count, bytes(EVENT_SIZE * count), 0, about=label(vma),
                        expect=count)
        for done in range(0, header.unread, _AT_ONCE):
            _submit(script, vma, fd, min(_AT_ONCE, header.unread - done))
        # the kernel knows the context at this address
        script.call('io_getevents', vma.start, 0, 0, bytes(EVENT_SIZE), 0, about=label(vma), expect=0)

    def patch(self, vma: Vma, space: MappedSpace) -> None:
        with Mem(space.stub.tid) as mem:
            mem.write(vma.start + _NUMBER_SIZE, _content(space.means.reader, space.memory, vma)[_NUMBER_SIZE:])


def _submit(script: Script, vma: Vma, fd: int, count: int) -> None:
    """Submit one request a number of times."""
    script.call_with_pointer('io_submit', (vma.start, count), 2, bytes(8 * count), range(0, 8 * count, 8),
                             empty_read(fd), about=label(vma), expect=count)


def _content(reader: ImageReader, memory: Memory, vma: Vma) -> bytes:
    return reader.read_memory(memory, vma.start, vma.end - vma.start)


def _header(reader: ImageReader, memory: Memory, vma: Vma) -> RingHeader:
    size = vma.end - vma.start
    try:
        if size > _LARGEST:
            raise ValueError('too large')
        return parse_ring_header(_content(reader, memory, vma), size)
    except ValueError as error:
        raise ImageDamaged(f'a ring of asynchronous I/O at {vma.start:x}: {error}', resource='memory.img') from error
