# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files in /proc of processes and threads that have ended: restored as such, or refused by their names."""

import errno
import os
import re
from collections.abc import Callable

import pytest

from ckptd.errors import Refused
from ckptd.kernel.fdinfo import read_fdinfo
from ckptd.kernel.fork import waiting_child
from ckptd.kernel.pidfd import pidfd_getfd, pidfd_open
from tests.worker.driver import DirectWorker, Place

pytestmark = [pytest.mark.needs('root', 'ptrace'), pytest.mark.timeout(120)]

FILES = STATUS, OOM, DIRECTORY, THREAD, REFERENCE = range(100, 105)


def open_all() -> None:
    with waiting_child() as child:
        for number, path, flags in (
                (STATUS, 'status', os.O_RDONLY), (OOM, 'oom_score_adj', os.O_RDWR), (DIRECTORY, '', os.O_RDONLY),
                (THREAD, f'task/{child}/stat', os.O_RDONLY), (REFERENCE, '', os.O_PATH | os.O_DIRECTORY)):
            fd = os.open(f'/proc/{child}/{path}', flags)
            os.dup2(fd, number, inheritable=False)
            os.close(fd)


def errors_of(pid: int) -> dict[int, int]:
    """The errno of reading each file."""
    pidfd = pidfd_open(pid, 0)
    found = {}
    try:
        for number in FILES:
            fd = pidfd_getfd(pidfd, number)
            try:
                os.stat('status', dir_fd=fd) if number in (DIRECTORY, REFERENCE) else os.read(fd, 100)
                found[number] = 0
            except OSError as error:
                found[number] = error.errno or 0
            finally:
                os.close(fd)
    finally:
        os.close(pidfd)
    return found


def places_of(pid: int) -> list[str]:
    """The path of each file after the number of the process, and its access."""
    links = [os.readlink(f'/proc/{pid}/fd/{number}') for number in FILES]  # noqa: PTH115
    flags = [read_fdinfo(pid, number).flags & (os.O_ACCMODE | os.O_PATH) for number in FILES]
    return [f'{re.sub("[0-9]+", "N", link)} {flag:#o}' for link, flag in zip(links, flags, strict=True)]


def test_they_come_back(place: Place, forked: Callable[..., int]) -> None:
    """Twice."""
    pid = forked(open_all)
    before = errors_of(pid), places_of(pid)
    assert set(before[0].values()) <= {errno.ESRCH, errno.ENOENT}
    for _ in range(2):
        image = place.checkpoint(pid, after='kill')
        os.waitpid(pid, 0)
        with DirectWorker() as worker:
            worker.run(place.request(0, operation='restore', image=image.name))
        assert (errors_of(pid), places_of(pid)) == before


def test_what_refers_to_more_is_refused(place: Place, forked: Callable[..., int]) -> None:
    def work() -> None:
        with waiting_child() as child:
            os.open(f'/proc/{child}/mountinfo', os.O_RDONLY)
    with pytest.raises(Refused, match='mountinfo is a file of a process that has ended'):
        place.checkpoint(forked(work))


def test_a_working_directory(place: Place, forked: Callable[..., int]) -> None:
    def work() -> None:
        with waiting_child() as child:
            os.chdir(f'/proc/{child}')
    with pytest.raises(Refused, match='the directory of a process that has ended') as caught:
        place.checkpoint(forked(work))
    assert caught.value.resource == 'cwd'
