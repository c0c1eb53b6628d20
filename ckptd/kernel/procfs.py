# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading of /proc for all modules of this package, and detection that a task is gone."""

import errno
import os
from pathlib import Path

_CHUNK = 1 << 14


def task_dir(pid: int, tid: int | None = None) -> str:
    """Return '/proc/PID', or '/proc/PID/task/TID' for one thread of it."""
    return f'/proc/{pid}' if tid is None else f'/proc/{pid}/task/{tid}'


def read_task_file(directory: str, name: str) -> bytes:
    """Read the whole of DIRECTORY/NAME. ProcessLookupError if the task is gone, FileNotFoundError if only the file
    is."""
    try:
        return read_file(f'{directory}/{name}')
    except FileNotFoundError as error:
        raise gone_or(error, directory) from None


def read_memory_file(directory: str, name: str) -> bytes:
    """Read a file about the address space. It is empty for a task without one: a zombie or a kernel thread."""
    try:
        return read_task_file(directory, name)
    except ProcessLookupError:
        # older kernels give an empty file, newer ones ESRCH as if the task were gone (proc_mem_open)
        if not Path(directory).exists():
            raise
        return b''


def read_file(path: str) -> bytes:
    """Read the whole of a file whose size stat(2) does not report."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # a seq_file ends a read at a record, so a short read is not the end
        data = chunk = os.read(fd, _CHUNK)
        if chunk:
            chunk = os.read(fd, _CHUNK)
        if not chunk:
            return data
        chunks = [data]
        while chunk:
            chunks.append(chunk)
            chunk = os.read(fd, _CHUNK)
        return b''.join(chunks)
    finally:
        os.close(fd)


def list_numbers(directory: str, name: str) -> list[int]:
    """Return the numbers among the entries of DIRECTORY/NAME in ascending order."""
    try:
        return sorted(int(entry) for entry in os.listdir(f'{directory}/{name}') if entry.isdecimal())  # noqa: PTH208
    except FileNotFoundError as error:
        raise gone_or(error, directory) from None


def gone_or(error: FileNotFoundError, directory: str) -> OSError:
    """Return ProcessLookupError if the task of `directory` is gone, else the error itself.

    /proc answers ENOENT both for a dead task and for a file that this kernel or task lacks (cwd of a zombie). Only the
    directory distinguishes the two.
    """
    if Path(directory).exists():
        return error
    return ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), directory)


def text(data: bytes) -> str:
    """Decode bytes of the kernel so that encoding gives the same bytes back. Names and paths need not be UTF-8."""
    return data.decode('utf-8', 'surrogateescape')
