# SPDX-License-Identifier: LGPL-2.1-or-later
"""kcmp(2)."""

import os
import threading
from collections.abc import Callable

import pytest

from ckptd.kernel.creds import become
from ckptd.kernel.kcmp import (
    EQUAL,
    GREATER,
    KCMP_FILES,
    KCMP_FS,
    KCMP_IO,
    KCMP_SIGHAND,
    KCMP_SYSVSEM,
    KCMP_VM,
    LESS,
    kcmp,
    kcmp_file,
)

pytestmark = pytest.mark.needs('ptrace')
NOBODY = 65534


def test_threads_share_and_a_fork_does_not(forked: Callable[..., int]) -> None:
    pid, go = forked(), threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        for kind in (KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND):
            assert kcmp(os.getpid(), thread.native_id or 0, kind) == EQUAL
            assert {kcmp(os.getpid(), pid, kind), kcmp(pid, os.getpid(), kind)} == {LESS, GREATER}
        for kind in (KCMP_IO, KCMP_SYSVSEM):
            assert kcmp(pid, pid, kind) == EQUAL
    finally:
        go.set()
        thread.join()


def test_open_file_descriptions(forked: Callable[..., int]) -> None:
    first = os.open('/dev/null', os.O_RDONLY)
    copy, second = os.dup(first), os.open('/dev/null', os.O_RDONLY)
    try:
        pid = forked()
        assert kcmp_file(os.getpid(), first, os.getpid(), copy) == EQUAL
        assert kcmp_file(os.getpid(), first, pid, first) == EQUAL
        assert kcmp_file(os.getpid(), first, pid, second) in (LESS, GREATER)
        with pytest.raises(OSError, match='kcmp: Bad file descriptor'):
            kcmp_file(pid, first, pid, 9999)
    finally:
        for fd in (first, copy, second):
            os.close(fd)


def test_gone() -> None:
    with pytest.raises(ProcessLookupError, match='kcmp'):
        kcmp(os.getpid(), 2**22 + 1, KCMP_VM)


@pytest.mark.needs('root')
def test_the_kernel_decides_with_the_credentials_of_the_caller(forked: Callable[..., int]) -> None:
    ours = forked()
    theirs = forked(lambda: become(NOBODY, NOBODY, [], 0))

    def ask() -> None:
        become(NOBODY, NOBODY, [], 0)
        try:
            kcmp(ours, ours, KCMP_VM)
        except PermissionError:
            return
        os._exit(2)
    forked(ask)
    # after a change of ids a process is not dumpable, so not even its own user may look into it
    with pytest.raises(AssertionError, match='failed'):
        forked(lambda: [become(NOBODY, NOBODY, [], 0), kcmp(theirs, theirs, KCMP_VM)])
    assert kcmp(theirs, theirs, KCMP_VM) == EQUAL
