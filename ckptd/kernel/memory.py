# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory of another process: read and write it, and find the pages that need to be read."""

import array
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Sequence

from ckptd.kernel.decl import IOWR, c_int, c_ssize_t, c_ulong, c_void_p, cstruct, libc, u32, u64
from ckptd.kernel.ptrace import iovec

PAGE = 4096
IOV_MAX = 1024              # <limits.h>

# <linux/fs.h>, since 6.7; GUARD since 6.15
PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_PFNZERO, PAGE_IS_GUARD = 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 8

# bits of a word of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst); GUARD since 6.15
_PM_PRESENT, _PM_SWAP, _PM_FILE, _PM_GUARD = 1 << 63, 1 << 62, 1 << 61, 1 << 58

Range = tuple[int, int]     # start, end


@cstruct(size=96)
class pm_scan_arg(ctypes.Structure):
    """<linux/fs.h>"""
    size: u64
    flags: u64
    start: u64
    end: u64
    walk_end: u64
    vec: u64
    vec_len: u64
    max_pages: u64
    category_inverted: u64
    category_mask: u64
    category_anyof_mask: u64
    return_mask: u64


@cstruct(size=24)
class page_region(ctypes.Structure):
    """<linux/fs.h>"""
    start: u64
    end: u64
    categories: u64


@cstruct(size=104)
class prctl_mm_map(ctypes.Structure):
    """<linux/prctl.h>"""
    start_code: u64
    end_code: u64
    start_data: u64
    end_data: u64
    start_brk: u64
    brk: u64
    start_stack: u64
    arg_start: u64
    arg_end: u64
    env_start: u64
    env_end: u64
    auxv: u64
    auxv_size: u32
    exe_fd: u32


PAGEMAP_SCAN = IOWR('f', 16, ctypes.sizeof(pm_scan_arg))


@libc
def process_vm_readv(pid: c_int, local_iov: c_void_p, liovcnt: c_ulong, remote_iov: c_void_p, riovcnt: c_ulong,
                     flags: c_ulong = 0) -> c_ssize_t: ...


def read_into(pid: int, ranges: Sequence[Range], address: int) -> int:
    """Copy the ranges of process pid, one after the other, to our memory at `address`; at most IOV_MAX ranges. Return
    the number of bytes copied, which is smaller than requested if a page cannot be read. EFAULT if the first one
    cannot."""
    remote = (iovec * len(ranges))(*[iovec(start, end - start) for start, end in ranges])
    local = iovec(address, sum(end - start for start, end in ranges))
    return process_vm_readv(pid, ctypes.byref(local), 1, remote, len(ranges), 0)


@libc
def mprotect(addr: c_void_p, length: c_ulong, prot: c_int) -> c_int: ...


@libc
def process_vm_writev(pid: c_int, local_iov: c_void_p, liovcnt: c_ulong, remote_iov: c_void_p, riovcnt: c_ulong,
                      flags: c_ulong = 0) -> c_ssize_t: ...


def read_bytes(pid: int, address: int, length: int) -> bytes:
    """Read a few bytes of readable memory, without an fd of /proc/PID/mem. EFAULT."""
    buffer = ctypes.create_string_buffer(length)
    if read_into(pid, [(address, address + length)], ctypes.addressof(buffer)) != length:
        raise OSError(errno.EFAULT, f'process {pid}: no {length} bytes at {address:#x}')
    return buffer.raw


def write_bytes(pid: int, address: int, data: bytes) -> None:
    """Write to writable memory, without an fd of /proc/PID/mem. EFAULT."""
    local = iovec(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0, len(data))
    remote = iovec(address, len(data))
    if process_vm_writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) != len(data):
        raise OSError(errno.EFAULT, f'process {pid}: no room for {len(data)} bytes at {address:#x}')


_memcmp = ctypes.CDLL(None).memcmp      # not a stub of decl.py, because -1 is not an error
_memcmp.argtypes, _memcmp.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int


def differing(first: int, second: int, length: int) -> list[Range]:
    """Return runs of whole pages, as offsets, that differ between two places in our memory. The search halves the
    range, so equal ranges take one comparison."""
    found: list[Range] = []
    todo = [(0, length)]
    while todo:
        start, end = todo.pop()
        if not _memcmp(first + start, second + start, end - start):
            continue
        if end - start <= PAGE:
            _append(found, start, end)
        else:
            middle = start + (end - start) // PAGE // 2 * PAGE
            todo += [(middle, end), (start, middle)]
    return found


class Mem:
    """/proc/PID/mem: reads and writes memory as a tracer may, regardless of page protections. One owner, one `with`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.open(f'/proc/{pid}/mem', os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> 'Mem':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1

    def read(self, address: int, length: int) -> bytes:
        """Read bytes. EIO if nothing is mapped. Addresses above 2**63 cannot be read."""
        data = os.pread(self.fd, length, address)
        if len(data) != length:
            raise OSError(errno.EIO, f'process {self.pid}: {len(data)} of {length} bytes at {address:#x}')
        return data

    def write(self, address: int, data: bytes) -> None:
        if os.pwrite(self.fd, data, address) != len(data):
            raise OSError(errno.EIO, f'process {self.pid}: cannot write {len(data)} bytes at {address:#x}')


class PageMap:
    """/proc/PID/pagemap: find pages with content of their own. Uses PAGEMAP_SCAN where the kernel has it."""

    _categories: int | None = None      # categories that the ioctl knows; 0: it does not exist; None: not probed yet
    _VEC = 2048

    def __init__(self, pid: int) -> None:
        self.fd = os.open(f'/proc/{pid}/pagemap', os.O_RDONLY | os.O_CLOEXEC)
        self._vec = (page_region * self._VEC)()

    def __enter__(self) -> 'PageMap':
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        self.fd = -1

    def anonymous(self, spans: Sequence[Range]) -> list[Range]:
        """Return runs of private pages that are present or swapped and are not of a file, not the zero page, and no
        guard.

        spans: ranges to look at, in ascending order. The ioctl also looks at what lies between them.
        """
        known = self._probe()
        if not known:
            return self._words(spans, lambda word: bool(word & (_PM_PRESENT | _PM_SWAP))
                               and not word & (_PM_FILE | _PM_GUARD))
        never = PAGE_IS_FILE | PAGE_IS_PFNZERO | known & PAGE_IS_GUARD
        return self._scan(*_hull(spans), inverted=never, mask=never, anyof=PAGE_IS_PRESENT | PAGE_IS_SWAPPED)

    def guards(self, spans: Sequence[Range]) -> list[Range]:
        """Return runs closed by madvise(MADV_GUARD_INSTALL) (6.13). Empty where the kernel cannot report them (<
        6.15)."""
        known = self._probe()
        if not known:
            return self._words(spans, lambda word: bool(word & _PM_GUARD))
        return self._scan(*_hull(spans), mask=PAGE_IS_GUARD) if known & PAGE_IS_GUARD else []

    def _probe(self) -> int:
        cls = type(self)
        if cls._categories is None:
            cls._categories = 0
            for extra in (PAGE_IS_GUARD, 0):
                try:
                    self._scan(0, PAGE, anyof=PAGE_IS_PRESENT | extra)
                except OSError as error:
                    if error.errno not in (errno.ENOTTY, errno.EINVAL):
                        raise
                else:
                    cls._categories = PAGE_IS_PRESENT | extra
                    break
        return cls._categories

    def _scan(self, start: int, end: int, *, inverted: int = 0, mask: int = 0, anyof: int = 0) -> list[Range]:
        found: list[Range] = []
        while start < end:
            arg = pm_scan_arg(ctypes.sizeof(pm_scan_arg), 0, start, end, 0, ctypes.addressof(self._vec), self._VEC, 0,
                              inverted, mask, anyof, 0)
            count = fcntl.ioctl(self.fd, PAGEMAP_SCAN, arg)
            for region in self._vec[:count]:
                _append(found, region.start, region.end)
            start = arg.walk_end if count == self._VEC else end
        return found

    def _words(self, spans: Sequence[Range], wanted: Callable[[int], bool]) -> list[Range]:
        # Mapping by mapping, because from the program to the stack are 40 TB of unmapped addresses: ten thousand
        # million words.
        found: list[Range] = []
        step = 512 * PAGE
        for base, stop in ((base, min(base + step, end)) for start, end in spans for base in range(start, end, step)):
            data = os.pread(self.fd, (stop - base) // PAGE * 8, base // PAGE * 8)
            for index, word in enumerate(array.array('Q', data)):
                if wanted(word):
                    _append(found, base + index * PAGE, base + (index + 1) * PAGE)
        return found


def _hull(spans: Sequence[Range]) -> Range:
    return (spans[0][0], spans[-1][1]) if spans else (0, 0)


def _append(ranges: list[Range], start: int, end: int) -> None:
    """Add a run. If it touches the last one, join them."""
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((start, end))
