# SPDX-License-Identifier: LGPL-2.1-or-later
"""io_uring(7): a ring of requests (SQ) and one of completions (CQ), which a program shares with the kernel."""

import ctypes
import errno
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ckptd.kernel.decl import c_int, c_uint, c_void_p, cstruct, syscall, u32, u64

RING_LINK = 'anon_inode:[io_uring]'     # of its fd, and the name of its mappings
# <linux/io_uring.h>: offsets for mmap(2) of a ring
IORING_OFF_SQ_RING, IORING_OFF_CQ_RING, IORING_OFF_SQES = 0, 0x8000000, 0x10000000
IORING_SETUP_CQSIZE = 1 << 3
IORING_SETUP_SQE128, IORING_SETUP_CQE32 = 1 << 10, 1 << 11
IORING_SETUP_NO_SQARRAY = 1 << 16
IORING_ENTER_REGISTERED_RING = 1 << 4
IORING_REGISTER_EVENTFD, IORING_REGISTER_PROBE = 4, 8
IORING_REGISTER_PBUF_STATUS, IORING_REGISTER_NAPI = 26, 27      # since 6.8, 6.9
IO_RINGFD_REG_MAX = 16      # include/linux/io_uring_types.h: rings that a task can register
IORING_MAX_ENTRIES = 32768  # io_uring/io_uring.h
SQE_SIZE, CQE_SIZE = 64, 16

BUFFER_GROUPS = 4096        # that are asked for, of 65,536, as each takes a microsecond or more
_NOWHERE = 1        # an address that no program has


@cstruct(size=40)
class io_sqring_offsets(ctypes.Structure):
    head: u32
    tail: u32
    ring_mask: u32
    ring_entries: u32
    flags: u32
    dropped: u32
    array: u32
    resv1: u32
    user_addr: u64


@cstruct(size=40)
class io_cqring_offsets(ctypes.Structure):
    head: u32
    tail: u32
    ring_mask: u32
    ring_entries: u32
    overflow: u32
    cqes: u32
    flags: u32
    resv1: u32
    user_addr: u64


@cstruct(size=120)
class io_uring_params(ctypes.Structure):
    sq_entries: u32
    cq_entries: u32
    flags: u32
    sq_thread_cpu: u32
    sq_thread_idle: u32
    features: u32
    wq_fd: u32
    resv0: u32
    resv1: u32
    resv2: u32
    sq_off: io_sqring_offsets
    cq_off: io_cqring_offsets


@cstruct(size=40)
class io_uring_buf_status(ctypes.Structure):
    buf_group: u32
    head: u32
    resv0: u64
    resv1: u64
    resv2: u64
    resv3: u64


@syscall(425)
def io_uring_setup(entries: c_uint, params: c_void_p) -> c_int: ...


@syscall(426)
def io_uring_enter(fd: c_int, to_submit: c_uint, min_complete: c_uint = 0, flags: c_uint = 0, arg: c_void_p = None,
                   size: c_uint = 0) -> c_int: ...


@syscall(427)
def io_uring_register(fd: c_int, opcode: c_uint, arg: c_void_p, nr_args: c_uint) -> c_int: ...


def make_ring(sq_entries: int, cq_entries: int, flags: int) -> tuple[int, io_uring_params]:
    """Make a ring. Return its fd, which execve(2) closes, and its parameters. OSError: EPERM if
    kernel.io_uring_disabled forbids it."""
    params = io_uring_params(cq_entries=cq_entries, flags=flags | IORING_SETUP_CQSIZE)
    return io_uring_setup(sq_entries, ctypes.byref(params)), params


# ---------------------------------------------------------------- /proc/PID/fdinfo

class RingInfo(NamedTuple):
    """The fdinfo of a ring (io_uring/fdinfo.c). Counters are modulo 2**32."""
    sq_entries: int
    sq_head: int            # requests that the kernel has taken
    sq_tail: int            # requests that the program has written
    cq_entries: int
    cq_head: int            # completions that the program has read
    cq_tail: int            # completions that the kernel has written
    has_thread: bool        # IORING_SETUP_SQPOLL
    files: int              # registered
    buffers: int            # registered
    polls: int              # requests that wait for a file to become ready
    overflowed: int         # completions for which the ring had no room
    has_personalities: bool
    has_napi: bool


def parse_ring_info(fields: Mapping[str, Sequence[str]]) -> RingInfo:
    """Parse the fields of FdInfo. Polls are lines 'op=6, task_works=0', overflows 'user_data=1, res=0, flags=0'."""
    def number(key: str, default: str = '0') -> int:
        return int(fields.get(key, [default])[0], 0)
    return RingInfo(number('SqMask') + 1, number('CachedSqHead'), number('SqTail'), number('CqMask') + 1,
                    number('CqHead'), number('CachedCqTail'), number('SqThread', '-1') != -1, number('UserFiles'),
                    number('UserBufs'), _count(fields, 'op='), _count(fields, 'user_data='),
                    'Personalities' in fields, fields.get('NAPI', ['disabled'])[0] != 'disabled')


def _count(fields: Mapping[str, Sequence[str]], prefix: str) -> int:
    return sum(len(values) for key, values in fields.items() if key.startswith(prefix))


def parse_ring_entries(fields: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Return the lines of requests that are written and not taken, and of completions that are not read."""
    lines = [value for key, values in fields.items() if key.isdigit() for value in values]
    return ([line for line in lines if line.startswith('opcode:')],
            [line for line in lines if line.startswith('user_data:')])


# ---------------------------------------------------------------- memory

class RingMemory:
    """The memory of a ring: `with mapped_ring(fd, params) as memory`.

    rings      heads and tails, completions, then the array of indices of requests
    sqes       requests
    """

    def __init__(self, rings: mmap.mmap, sqes: mmap.mmap, params: io_uring_params) -> None:
        self.rings, self.sqes, self._params = rings, sqes, params

    def _word(self, at: int) -> int:
        return int.from_bytes(self.rings[at:at + 4], 'little')

    def _set_word(self, at: int, value: int) -> None:
        self.rings[at:at + 4] = (value & 0xFFFFFFFF).to_bytes(4, 'little')

    @property
    def sq_head(self) -> int:
        return self._word(self._params.sq_off.head)

    @property
    def sq_tail(self) -> int:
        return self._word(self._params.sq_off.tail)

    @sq_tail.setter
    def sq_tail(self, value: int) -> None:
        self._set_word(self._params.sq_off.tail, value)

    @property
    def sq_dropped(self) -> int:
        """Requests that the kernel has taken and not begun, because their index was too large."""
        return self._word(self._params.sq_off.dropped)

    @property
    def cq_head(self) -> int:
        return self._word(self._params.cq_off.head)

    @cq_head.setter
    def cq_head(self, value: int) -> None:
        self._set_word(self._params.cq_off.head, value)

    @property
    def cq_tail(self) -> int:
        return self._word(self._params.cq_off.tail)

    def set_indices(self, entries: int, value: int) -> None:
        """Set the index of the request of each slot."""
        for slot in range(entries):
            self._set_word(self._params.sq_off.array + 4 * slot, value)


def rings_size(params: io_uring_params) -> int:
    """Return the bytes of both rings."""
    completions = params.cq_entries * (CQE_SIZE << bool(params.flags & IORING_SETUP_CQE32))
    end = params.cq_off.cqes + completions
    if not params.flags & IORING_SETUP_NO_SQARRAY:
        end = max(end, params.sq_off.array + 4 * params.sq_entries)
    return _whole_pages(end)


def sqes_size(params: io_uring_params) -> int:
    """Return the bytes of the requests."""
    return _whole_pages(params.sq_entries * (SQE_SIZE << bool(params.flags & IORING_SETUP_SQE128)))


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


@contextmanager
def mapped_ring(fd: int, params: io_uring_params) -> Iterator[RingMemory]:
    """Map the memory of a ring. OSError EINVAL if it is that of the program (IORING_SETUP_NO_MMAP)."""
    with mmap.mmap(fd, rings_size(params), offset=IORING_OFF_SQ_RING) as rings, \
            mmap.mmap(fd, sqes_size(params), offset=IORING_OFF_SQES) as sqes:
        yield RingMemory(rings, sqes, params)


# ---------------------------------------------------------------- what fdinfo does not show

def refusal_of(fd: int, opcode: int) -> int:
    """Return the errno with which the kernel refuses to register what is nowhere in memory; 0 if it does not."""
    try:
        io_uring_register(fd, opcode, _NOWHERE, 1)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def is_enabled(fd: int) -> bool:
    """Whether requests may be submitted: not with IORING_SETUP_R_DISABLED, before it is enabled."""
    try:
        io_uring_enter(fd, 0)
    except OSError as error:
        return error.errno != errno.EBADFD
    return True


def first_buffer_group(fd: int, groups: int = BUFFER_GROUPS) -> int:
    """Return the lowest group of provided buffers below `groups`; -1 if there is none. Before Linux 6.8, which cannot
    tell, return 0."""
    status = io_uring_buf_status()
    for number in range(groups):
        status.buf_group = number
        try:
            io_uring_register(fd, IORING_REGISTER_PBUF_STATUS, ctypes.byref(status), 1)
        except OSError as error:
            if error.errno == errno.ENOENT:
                continue
        return number
    return -1
