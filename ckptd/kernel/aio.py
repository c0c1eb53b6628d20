# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asynchronous I/O of the kernel (io_setup(2)): a context, and the ring in memory into which it writes completions."""

import struct
from mmap import PAGESIZE
from typing import NamedTuple

from ckptd.kernel.procfs import read_file, text

RING_NAME = '/[aio] (deleted)'      # of the mapping of a ring in /proc/PID/maps
# fs/aio.c: struct aio_ring, and <linux/aio_abi.h>: struct io_event, struct iocb
HEADER_SIZE, EVENT_SIZE, IOCB_SIZE = 32, 32, 64
_HEADER = struct.Struct('<8I')      # id, nr, head, tail, magic, compat_features, incompat_features, header_length
_EVENT = struct.Struct('<QQqq')     # data, obj, res, res2
_IOCB = struct.Struct('<QIIHhIQQqQII')
_MAGIC = 0xA10A10A1


class RingHeader(NamedTuple):
    """The header of a ring. number: index of the context in its process, by which the kernel finds it. events: room in
    the ring. head: of the next completion to read, which the program moves too. tail: of the next one to write."""
    number: int
    events: int
    head: int
    tail: int

    @property
    def unread(self) -> int:
        return (self.tail - self.head) % self.events


def parse_ring_header(data: bytes, size: int) -> RingHeader:
    """Parse the header of a ring of `size` bytes, which its program may have overwritten. ValueError."""
    number, events, head, tail, magic, _, _, _ = _HEADER.unpack_from(data)
    if magic != _MAGIC or events != ring_events(size) or max(head, tail) >= events:
        raise ValueError('not the header of a ring')
    return RingHeader(number, events, head, tail)


def event_data(event: bytes) -> int:
    """Return the number that the program gave to the request of a completion."""
    return int(_EVENT.unpack(event)[0])


def empty_read(fd: int, data: int = 0) -> bytes:
    """Make a struct iocb that reads no bytes (IOCB_CMD_PREAD). It is done at once, whatever its result."""
    return _IOCB.pack(data, 0, 0, 0, 0, fd, 0, 0, 0, 0, 0, 0)


# ---------------------------------------------------------------- sizes: fs/aio.c, ioctx_alloc and aio_setup_ring

def ring_events(size: int) -> int:
    """Return the number of completions that a ring of `size` bytes has room for. One of them stays free."""
    return (size - HEADER_SIZE) // EVENT_SIZE


def ring_size(requests: int, processors: int) -> int:
    """Return the bytes of the ring that io_setup(2) makes for this number of requests."""
    size = HEADER_SIZE + EVENT_SIZE * (2 * max(requests, 4 * processors) + 2)
    return -(-size // PAGESIZE) * PAGESIZE


def requests_for(size: int) -> int:
    """Return the lowest number of requests for which io_setup(2) makes a ring of `size` bytes."""
    return max((ring_events(size - PAGESIZE) - 2) // 2 + 1, 1)


def batch_size(events: int, processors: int) -> int:
    """Return the number of requests that a processor takes at once from those that are free."""
    return max((events - 1) // (processors * 4), 1)


def possible_processors() -> list[int]:
    """List the processors that this kernel can have (num_possible_cpus)."""
    found: list[int] = []
    for part in text(read_file('/sys/devices/system/cpu/possible')).strip().split(','):
        first, _, last = part.partition('-')
        found += range(int(first), int(last or first) + 1)
    return found
