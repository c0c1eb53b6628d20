# SPDX-License-Identifier: LGPL-2.1-or-later
"""Contexts of asynchronous I/O (io_setup(2)): requests that run, and rings that are refused."""

import ctypes
import os
from collections.abc import Callable

import pytest

from ckptd.errors import Busy, NotSupported, Refused
from ckptd.kernel.aio import (
    HEADER_SIZE,
    RING_NAME,
    empty_read,
    parse_ring_header,
    possible_processors,
    requests_for,
    ring_events,
    ring_size,
)
from ckptd.kernel.maps import read_maps
from ckptd.kernel.memory import PAGE
from tests.lib.victim import Victim
from tests.worker.driver import Place
from tests.worker.unharmed import changes, look

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

IO_SETUP, IO_DESTROY = 206, 207     # <asm/unistd_64.h>
libc = ctypes.CDLL(None, use_errno=True)


def io_setup(requests: int = 10) -> int:
    context = ctypes.c_ulong(0)
    assert libc.syscall(IO_SETUP, requests, ctypes.byref(context)) == 0
    return context.value


def test_requests_that_run(victim: Callable[..., Victim], place: Place) -> None:
    """They wait for a pipe, and complete afterwards, behind what was not read before."""
    running = victim('aio_rings', 'running')
    before = look(running)
    with pytest.raises(Busy, match='has 2 requests of asynchronous I/O that are running') as busy:
        place.checkpoint(running.pid, after='kill')
    assert busy.value.exit_status == 75
    assert changes(before, look(running)) == []
    running.finish()


def test_a_ring_of_the_parent(forked: Callable[..., int], place: Place) -> None:
    """A child inherits the memory, and not the context."""
    context = io_setup()
    pid = forked()
    assert libc.syscall(IO_DESTROY, ctypes.c_ulong(context)) == 0
    with pytest.raises(NotSupported, match='belongs to another process, or was moved'):
        place.checkpoint(pid)


def test_a_header_that_the_program_has_overwritten(forked: Callable[..., int], place: Place) -> None:
    pid = forked(lambda: ctypes.memset(io_setup() + 4, 255, HEADER_SIZE - 4))
    with pytest.raises(NotSupported, match='whose header was overwritten'):
        place.checkpoint(pid)


def test_a_ring_that_may_not_be_written(forked: Callable[..., int], place: Place) -> None:
    pid = forked(lambda: libc.mprotect(ctypes.c_void_p(io_setup()), PAGE, 1))
    with pytest.raises(Refused, match='not mapped whole and writable'):
        place.checkpoint(pid)


@pytest.mark.parametrize('requests', [1, 8, 62, 63, 64, 1000, 4095, 30000])
def test_the_size_of_a_ring(requests: int) -> None:
    """As the kernel makes it; and the lowest number of requests makes one of the same size."""
    context = io_setup(requests)
    [ring] = [one for one in read_maps(os.getpid()) if one.path == RING_NAME]
    with open('/proc/self/mem', 'rb', buffering=0) as mem:  # noqa: PTH123
        mem.seek(context)
        header = parse_ring_header(mem.read(HEADER_SIZE), ring.size)
    assert libc.syscall(IO_DESTROY, ctypes.c_ulong(context)) == 0
    processors = len(possible_processors())
    assert ring.size == ring_size(requests, processors) == ring_size(requests_for(ring.size), processors)
    assert header == (header.number, ring_events(ring.size), 0, 0)
    assert requests_for(ring.size) <= max(requests, 4 * processors)


@pytest.mark.parametrize('words', [(0, 127, 0, 0, 1), (0, 126, 0, 0, 0xA10A10A1), (0, 127, 127, 0, 0xA10A10A1),
                                   (0, 127, 0, 127, 0xA10A10A1)])
def test_a_header_that_is_none(words: tuple[int, ...]) -> None:
    data = b''.join(word.to_bytes(4, 'little') for word in words).ljust(HEADER_SIZE, b'\0')
    with pytest.raises(ValueError, match='not the header of a ring'):
        parse_ring_header(data, PAGE)


def test_a_request_that_reads_nothing() -> None:
    """struct iocb of <linux/aio_abi.h>."""
    assert empty_read(7, 5) == (5).to_bytes(8, 'little') + bytes(12) + (7).to_bytes(4, 'little') + bytes(40)
