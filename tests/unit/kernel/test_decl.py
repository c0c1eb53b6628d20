# SPDX-License-Identifier: LGPL-2.1-or-later
"""C declarations: layouts, stubs, errno and ioctl numbers."""

import ctypes
import errno
import os

import pytest

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import (
    IO,
    IOR,
    IOW,
    IOWR,
    c_int,
    c_long,
    c_size_t,
    c_void_p,
    cstruct,
    libc,
    s64,
    syscall,
    u8,
    u32,
)


@cstruct(size=16)
class inner(ctypes.Structure):
    """a struct to embed"""
    first: u8
    second: s64


@libc
def _dup2(oldfd: c_int, newfd: c_int = 250) -> c_int: ...


@libc
def memcmp(left: c_void_p, right: c_void_p, count: c_size_t) -> c_int: ...


@syscall(NR['getpid'])
def getpid() -> c_long: ...


def test_layout_follows_the_annotations() -> None:
    @cstruct(size=24)
    class outer(ctypes.Structure):
        head: u32
        body: inner
    assert (inner.second.offset, outer.body.offset) == (8, 8)
    value = outer(head=2**32 + 1)
    value.body.second = -5
    assert (value.head, value.body.second) == (1, -5)


def test_a_wrong_size_is_an_error_at_import() -> None:
    with pytest.raises(TypeError, match='struct wrong has 4 bytes, not 8'):
        @cstruct(size=8)
        class wrong(ctypes.Structure):
            only: u32


def test_arguments_defaults_and_keywords() -> None:
    try:
        assert _dup2(0) == 250
        assert _dup2(oldfd=0, newfd=251) == _dup2(0, newfd=251) == 251
    finally:
        os.close(250)
        os.close(251)
    with pytest.raises(TypeError):
        _dup2()  # type: ignore[call-arg]


def test_errno_becomes_an_error_that_names_the_call() -> None:
    with pytest.raises(OSError, match=r'^\[Errno 9\] dup2: Bad file descriptor$') as caught:
        _dup2(9999)
    assert caught.value.errno == errno.EBADF
    assert not isinstance(caught.value, PermissionError)


def test_a_system_call_by_number() -> None:
    assert getpid() == os.getpid()


def test_ioctl_numbers() -> None:
    # <linux/fs.h>: FS_IOC_GETFLAGS and FS_IOC_SETFLAGS
    assert IOR('f', 1, 8) == 0x80086601
    assert IOW('f', 2, 8) == 0x40086602
    assert IOWR('f', 11, 32) == 0xC020660B       # FS_IOC_FIEMAP
    assert IO('T', 0x1B) == 0x541B               # FIONREAD
