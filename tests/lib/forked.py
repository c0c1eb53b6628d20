# SPDX-License-Identifier: LGPL-2.1-or-later
"""A child to look at."""

import contextlib
import fcntl
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def close_pytests_files() -> None:
    """For a child: close files that are open for writing and do not belong to a test, such as a log that pytest writes
    to. It would not be as it was when the child is restored."""
    for name in os.listdir('/proc/self/fd'):    # noqa: PTH208
        with contextlib.suppress(OSError):
            link, flags = os.readlink(f'/proc/self/fd/{name}'), fcntl.fcntl(int(name), fcntl.F_GETFL)   # noqa: PTH115
            if int(name) > 2 and Path(link).is_file() and flags & os.O_ACCMODE and 'pytest-of-' not in link:
                os.close(int(name))


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
