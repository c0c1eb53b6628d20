# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every victim written in Python shares; the twin of victim.h. tests/lib/victim.py is the other side."""

import os

_go = -1


def ready() -> None:
    """Say that all is prepared. From here on the victim holds nothing whose other end is outside its tree."""
    global _go
    fd, fifo = os.environ.get('CKPTD_VICTIM_READY'), os.environ.get('CKPTD_VICTIM_GO')
    if fd is None or fifo is None:      # run by hand: go at once
        _go = os.open('/dev/zero', os.O_RDONLY)
        return
    # read-write: the FIFO then has a writer always, and opening it neither waits nor ends in end-of-file
    _go = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)
    os.write(int(fd), f'{os.getpid()}\n'.encode())
    os.close(int(fd))


def not_the_one_to_report() -> None:
    """For a forked child, which must let go of the handshake."""
    fd = os.environ.get('CKPTD_VICTIM_READY')
    if fd is not None:
        os.close(int(fd))


def wait_for_go() -> None:
    """Block until the harness says go."""
    assert len(os.read(_go, 1)) == 1
