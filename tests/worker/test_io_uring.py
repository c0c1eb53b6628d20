# SPDX-License-Identifier: LGPL-2.1-or-later
"""io_urings: what is refused and by which words, how far a restart counts, and images that lie about them."""

import ctypes
import errno
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from ckptd.errors import Busy, ImageDamaged, NotSupported, PermissionDenied, Refused
from ckptd.image.records import Extent
from ckptd.kernel.fdinfo import read_fdinfo
from ckptd.kernel.io_uring import (
    IORING_REGISTER_EVENTFD,
    io_uring_enter,
    io_uring_register,
    make_ring,
    mapped_ring,
    parse_ring_info,
)
from ckptd.objects.files import io_uring
from ckptd.objects.files.io_uring import IoUring
from ckptd.objects.files.registry import Kinds
from tests.worker.driver import DirectWorker, Place
from tests.worker.test_restore import Generation, generation

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

# <linux/io_uring.h>
OP_POLL_ADD, POLLIN = 6, 1
CQE_SKIP_SUCCESS = 1 << 6       # sqe.flags
IOPOLL, SQPOLL, R_DISABLED, SINGLE_ISSUER = 1, 2, 1 << 6, 1 << 12
BUFFERS, FILES, RING_FDS, PBUF_RING = 0, 2, 20, 22      # IORING_REGISTER_*
PAGE = ctypes.create_string_buffer(8192)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).make()


def register(fd: int, opcode: int, *words: int) -> None:
    data = b''.join(word.to_bytes(8, 'little') for word in words)
    io_uring_register(fd, opcode, ctypes.create_string_buffer(data, len(data)), 1)


def ring(flags: int = 0) -> int:
    return make_ring(8, 16, flags)[0]


def of_every_refused_kind() -> None:
    for flags in (SQPOLL, IOPOLL, R_DISABLED, SINGLE_ISSUER):
        ring(flags)
    register(ring(), FILES, 0)
    register(ring(), BUFFERS, ctypes.addressof(PAGE), 4096)
    register(ring(), IORING_REGISTER_EVENTFD, os.eventfd(0))
    register(ring(), PBUF_RING, 0, 8 | 7 << 32 | 1 << 48, 0, 0, 0)       # 8 buffers, group 7, IOU_PBUF_RING_MMAP


def test_what_is_refused(forked: Callable[..., int], place: Place) -> None:
    pid = forked(of_every_refused_kind)
    with pytest.raises(Refused) as refused:
        place.checkpoint(pid)
    assert refused.value.exit_status == 3
    reasons = [re.sub(r'^an io_uring with (.*) cannot be dumped$', r'\1', row.reason) for row in refused.value.refusals]
    assert reasons == [
        'a thread of the kernel that takes its requests (IORING_SETUP_SQPOLL)',
        'busy polling of devices (IORING_SETUP_IOPOLL)', 'requests disabled (IORING_SETUP_R_DISABLED)',
        'one thread that may use it (IORING_SETUP_SINGLE_ISSUER)', 'registered files', 'registered buffers',
        'a registered eventfd', 'provided buffers (group 7)']


def test_a_ring_that_a_thread_has_registered(forked: Callable[..., int], place: Place) -> None:
    def make() -> None:
        fd = ring()
        register(fd, RING_FDS, 2**32 - 1, fd)       # under any number

    pid = forked(make)
    with pytest.raises(NotSupported, match='has 1 io_urings registered for itself'):
        place.checkpoint(pid)


def submit(opcode: int, flags: int = 0, file: int = -1) -> None:
    """Make a ring and submit a request."""
    fd, params = make_ring(8, 16, 0)
    with mapped_ring(fd, params) as memory:
        memory.sqes[0:2] = bytes([opcode, flags])
        memory.sqes[4:8] = file.to_bytes(4, 'little', signed=True)
        memory.sqes[28:32] = POLLIN.to_bytes(4, 'little')
        memory.sq_tail = 1
        assert io_uring_enter(fd, 1) == 1


def test_a_request_that_runs(forked: Callable[..., int], place: Place) -> None:
    """It waits for a pipe, which nobody writes to. The process lives on, and so does the request."""
    pid = forked(lambda: submit(OP_POLL_ADD, file=os.pipe()[0]))
    with pytest.raises(Busy, match='an io_uring has 1 requests that are running') as busy:
        place.checkpoint(pid, after='kill')
    assert busy.value.exit_status == 75
    [fd] = [one.name for one in Path(f'/proc/{pid}/fd').iterdir() if 'io_uring' in str(one.readlink())]
    text = Path(f'/proc/{pid}/fdinfo/{fd}').read_text()
    assert 'op=6' in text
    assert '\nSqTail:\t1\n' in text
    assert '\nCqHead:\t0\n' in text


def test_a_request_without_a_completion(forked: Callable[..., int], place: Place) -> None:
    pid = forked(lambda: submit(0, CQE_SKIP_SUCCESS))
    with pytest.raises(Busy, match='1 requests that are running') as busy:
        place.checkpoint(pid)
    assert 'IOSQE_CQE_SKIP_SUCCESS' in busy.value.hint


def test_after_ten_million_requests(generation: Callable[..., Generation], place: Place) -> None:
    """The next read completes after the restart. A dry run tells how long the restart takes."""
    tree = generation('io_urings', '10000000')
    image = tree.kill()
    with DirectWorker() as worker:
        result = worker.run(place.request(0, operation='check-restore', image=image.name))
    [row] = [row for row in result['refusals'] if 'io_uring' in row['reason']]
    assert row['severity'] == 'warning'
    assert re.search(r'has done 10,000,000 requests: .* takes about 0\.9 s', row['reason'])
    tree.restore(image)
    tree.finish()


def test_too_many_requests(generation: Callable[..., Generation], place: Place,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a restart repeats: the tree is not killed, and an image of it is not restored."""
    tree = generation('io_urings', '500000')
    image = place.checkpoint(tree.victim.pid)
    monkeypatch.setattr(io_uring, 'LIMIT', 400_000)
    with pytest.raises(Refused, match='has done 500,000 requests') as refused:
        place.checkpoint(tree.victim.pid, forked=True, after='kill')
    assert refused.value.exit_status == 3
    with pytest.raises(Refused, match='has done 500,000 requests') as refused, DirectWorker(forked=True) as worker:
        worker.run(place.request(0, operation='restore', image=image.name, new_pidns=True))
    assert refused.value.exit_status == 3
    tree.finish()


# ---------------------------------------------------------------- images that lie

class Making:
    """The means of a restart, without a restart. memory: the bytes of all extents."""

    def __init__(self, memory: bytes) -> None:
        self._memory, self.made = memory, -1

    as_user = nullcontext

    def once(self, key: object, make: Callable[[], int]) -> int:
        self.made = make()
        return self.made

    def pread(self, extent: Extent, length: int, offset: int) -> bytes:
        return self._memory[:length]


SAVED = SimpleNamespace(flags=os.O_RDWR)
GOOD = {'inode': 1, 'sq_entries': 8, 'cq_entries': 16, 'flags': 0, 'sq_head': 3, 'cq_tail': 2, 'dropped': 1,
        'completions_at': 64, 'indices_at': 320, 'rings': Extent(0, 0, 4096), 'requests': Extent(0, 0, 4096)}
# the heads and tails of both rings (struct io_rings), and the dropped requests
MEMORY = b''.join(word.to_bytes(4, 'little') for word in (3, 3, 2, 2, 7, 15, 8, 16, 1)).ljust(4096, b'\0')


@pytest.mark.parametrize(('lie', 'words'), [
    ({'sq_entries': 3}, '3 entries'), ({'sq_entries': 0}, '0 entries'), ({'cq_entries': 1 << 30}, 'entries'),
    ({'flags': SQPOLL}, 'flags 0x2'), ({'sq_head': 10**9, 'cq_tail': 10**9, 'dropped': 0}, '1000000000 requests'),
    ({'dropped': 0}, '0 of them dropped'), ({'sq_head': 10**6 + 2, 'dropped': 10**6}, '1000000 of them'),
    ({'flags': 1 << 16}, 'no indices'), ({'rings': Extent(0, 0, 1 << 40)}, 'bytes of memory'),
    ({'requests': Extent(0, 0, 0)}, '0 bytes of memory'), ({'sq_head': 2, 'cq_tail': 1}, 'counters'),
])
def test_a_record_that_lies(lie: dict[str, Any], words: str) -> None:
    kind, before = Kinds().by_tag['io_uring'], own_fds()
    with pytest.raises(ImageDamaged, match=words):
        kind.create(IoUring(**{**GOOD, **lie}), SAVED, Making(MEMORY))      # type: ignore[arg-type]
    assert own_fds() == before


def test_a_record_of_another_kernel() -> None:
    with pytest.raises(NotSupported, match='another layout'):
        Kinds().by_tag['io_uring'].create(IoUring(**{**GOOD, 'completions_at': 128}), SAVED,  # type: ignore[arg-type]
                                          Making(MEMORY))  # type: ignore[arg-type]


def test_where_no_ring_can_be_made(forked: Callable[..., int], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with kernel.io_uring_disabled=2, which is one setting of the whole machine."""
    def forbidden(sq_entries: int, cq_entries: int, flags: int) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    pid = forked(ring)
    monkeypatch.setattr(io_uring, 'make_ring', forbidden)
    with pytest.raises(PermissionDenied, match='an io_uring cannot be made here') as denied:
        place.checkpoint(pid, forked=True)
    assert 'kernel.io_uring_disabled' in denied.value.hint
    [row] = Kinds().by_tag['io_uring'].restart_findings(IoUring(**GOOD), SAVED,  # type: ignore[arg-type]
                                                        Making(MEMORY))  # type: ignore[arg-type]
    assert (row.severity, row.errno) == ('refusal', 'EPERM')
    assert 'kernel.io_uring_disabled' in row.hint


def test_a_record_that_does_not() -> None:
    making = Making(MEMORY)
    fd = Kinds().by_tag['io_uring'].create(IoUring(**GOOD), SAVED, making)      # type: ignore[arg-type]
    info = parse_ring_info(read_fdinfo(os.getpid(), fd).fields)
    os.close(fd)
    os.close(making.made)
    assert (info.sq_entries, info.sq_head, info.sq_tail) == (8, 3, 3)
    assert (info.cq_entries, info.cq_head, info.cq_tail) == (16, 2, 2)


def own_fds() -> int:
    return len(list(Path('/proc/self/fd').iterdir()))
