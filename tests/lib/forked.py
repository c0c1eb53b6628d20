# SPDX-License-Identifier: LGPL-2.1-or-later
"""A child to look at."""

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator

import pytest


def _open_files() -> list[int]:
    found = [int(name) for name in os.listdir('/proc/self/fd')]     # noqa: PTH208
    return [fd for fd in found if fd > 2 and os.path.lexists(f'/proc/self/fd/{fd}')]


# those of pytest itself: a log that it writes to is not as it was when a child is restored
_PYTESTS_OWN = _open_files()


def close_pytests_files() -> None:
    """For a child: close the files of pytest, but for standard input and output."""
    for fd in _PYTESTS_OWN:
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.fixture
def forked() -> Iterator[Callable[..., int]]:
    """forked(setup) is the pid of a child that has run setup() and waits; it is killed and reaped after the test."""
    with contextlib.ExitStack() as stack:
        def fork(setup: Callable[[], object] = lambda: None) -> int:
            ready, done = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', DeprecationWarning)     # 3.12 warns where there are threads
                pid = os.fork()
            if pid == 0:
                try:
                    os.close(ready)
                    close_pytests_files()
                    setup()
                    os.write(done, b'!')
                    signal.pause()
                finally:
                    os._exit(1)
            stack.callback(os.waitpid, pid, 0)
            stack.callback(os.kill, pid, signal.SIGKILL)
            os.close(done)
            try:
                assert os.read(ready, 1) == b'!', 'the child failed in its setup'
            finally:
                os.close(ready)
            return pid
        yield fork
