# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks that tell of their owner's life: no forked child has them."""

import os
import threading
from pathlib import Path

from ckptd import flock
from ckptd.image.writer import Incoming, remove_stale
from ckptd.journal import Journal
from tests.lib.brood import Brood


def test_a_forked_child_has_no_lock(tmp_path: Path) -> None:
    path = tmp_path / 'file'
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    flock.lock(fd)
    with Brood() as brood:
        brood.fork()
        assert flock.is_locked(path)
        flock.close(fd)
        assert not flock.is_locked(path)


def test_what_dies_with_a_child_alive_counts_as_dead(tmp_path: Path) -> None:
    """A worker that is killed while the child lives that asks the kernel for it."""
    runtime, spool = tmp_path / 'runtime', tmp_path / 'spool'
    spool.mkdir()
    with Brood() as brood:
        def work() -> None:
            nonlocal entry, incoming
            entry, incoming = Journal(runtime).begin(1, 'x', 'cgroup'), Incoming(spool, '20260131_120000_x_0000')
            brood.fork()
            entry.close()
            os.close(incoming._lock)    # as the kernel does it: nothing is removed

        entry = incoming = None
        brood.fork(work)
        assert [one.alive for one in Journal(runtime).entries()] == [False]
        assert remove_stale(spool) == ['20260131_120000_x_0000']


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    path = tmp_path / 'directory'
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    flock.lock(fd)
    thread = threading.Thread(target=flock.wait_free, args=(path,))
    thread.start()
    assert thread.is_alive()
    flock.close(fd)
    thread.join(10)
    assert not thread.is_alive()
    flock.wait_free(tmp_path / 'nothing')
