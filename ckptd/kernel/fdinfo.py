# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/fdinfo/FD: the state of an open file description (proc_pid_fdinfo(5))."""

from typing import NamedTuple

from ckptd.kernel.procfs import list_numbers, read_task_file, task_dir, text


class FdInfo(NamedTuple):
    """The contents of an fdinfo file."""
    pos: int                        # bytes
    flags: int                      # O_*, with O_CLOEXEC for this fd
    mnt_id: int
    ino: int                        # 0 before Linux 5.14
    fields: dict[str, list[str]]    # every line by its first word ('tfd', 'inotify', 'eventfd-count', 'lock'), values
                                    # in the order of lines


def parse_fdinfo(data: bytes) -> FdInfo:
    """Parse an fdinfo file. Lines are 'key: value' or, for inotify and fanotify, 'key name:value name:value'."""
    fields: dict[str, list[str]] = {}
    for line in text(data).split('\n'):
        if line:
            key, value = _split(line)
            fields.setdefault(key, []).append(value)
    return FdInfo(int(fields['pos'][0]), int(fields['flags'][0], 8), int(fields['mnt_id'][0]),
                  int(fields.get('ino', ['0'])[0]), fields)


def _split(line: str) -> tuple[str, str]:
    key, colon, value = line.partition(':')
    if ' ' in key.strip():
        key, _, value = line.strip().partition(' ')
    return key.strip(), value.strip() if colon else ''


def read_fdinfo(pid: int, fd: int) -> FdInfo:
    """Read an fdinfo file. FileNotFoundError if the process has no such fd, ProcessLookupError if it is gone."""
    return parse_fdinfo(read_task_file(task_dir(pid), f'fdinfo/{fd}'))


def list_fds(pid: int) -> list[int]:
    """List the open fds of a process in ascending order. For the calling process, the fd of this listing is among
    them."""
    return list_numbers(task_dir(pid), 'fd')
