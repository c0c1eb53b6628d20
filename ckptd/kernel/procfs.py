# SPDX-License-Identifier: LGPL-2.1-or-later
"""How every reader of /proc in this package reads it, and how it learns that a task is gone."""

import errno
import os
from pathlib import Path

_CHUNK = 1 << 14


def task_dir(pid: int, tid: int | None = None) -> str:
    """'/proc/PID', or '/proc/PID/task/TID' for one thread of it."""
    return f'/proc/{pid}' if tid is None else f'/proc/{pid}/task/{tid}'


def read_task_file(directory: str, name: str) -> bytes:
    """The whole of DIRECTORY/NAME. ProcessLookupError when the task is gone, FileNotFoundError if only the file is."""
    try:
        return read_file(f'{directory}/{name}')
    except FileNotFoundError as error:
        raise gone_or(error, directory) from None


def read_memory_file(directory: str, name: str) -> bytes:
    """The same for a file about the address space: empty for a task that has none, a zombie or a kernel thread."""
    try:
        return read_task_file(directory, name)
    except ProcessLookupError:
        # older kernels give an empty file, newer ones ESRCH as if the task were gone (proc_mem_open)
        if not Path(directory).exists():
            raise
        return b''


def read_file(path: str) -> bytes:
    """The whole of a file whose size stat(2) does not know."""
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
    """The numbers among the entries of DIRECTORY/NAME, ascending."""
    try:
        return sorted(int(entry) for entry in os.listdir(f'{directory}/{name}') if entry.isdecimal())  # noqa: PTH208
    except FileNotFoundError as error:
        raise gone_or(error, directory) from None


def gone_or(error: FileNotFoundError, directory: str) -> OSError:
    """ProcessLookupError if the task of `directory` is gone, else the error itself.

    /proc answers ENOENT both for a dead task and for a file that this kernel lacks or that the task has no more
    (cwd of a zombie); only the directory tells the two apart.
    """
    if Path(directory).exists():
        return error
    return ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), directory)


def text(data: bytes) -> str:
    """Bytes of the kernel as a str that gives the same bytes back; names and paths need not be UTF-8."""
    return data.decode('utf-8', 'surrogateescape')
