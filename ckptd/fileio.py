# SPDX-License-Identifier: LGPL-2.1-or-later
"""write(2) and pwrite(2) until all is written. A full disk or a signal may end one call early."""

import os

Data = bytes | bytearray | memoryview


def write_all(fd: int, data: Data) -> None:
    """Call write(2) until nothing is left."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view):]


def pwrite_all(fd: int, data: Data, offset: int) -> None:
    """Call pwrite(2) until nothing is left."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
