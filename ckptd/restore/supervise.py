# SPDX-License-Identifier: LGPL-2.1-or-later
"""`wait`: this process is the parent of the roots and stays until the first of them has ended."""

import os
import select
from collections.abc import Sequence
from contextlib import ExitStack

from ckptd.kernel.ptrace import WALL
from ckptd.kernel.task import read_cgroup2
from ckptd.protocol.channel import Channel
from ckptd.protocol.messages import Cancel


def cgroup_of(root: int) -> str:
    """Return the cgroup of the root; '' if it has ended already."""
    try:
        return read_cgroup2(root)
    except ProcessLookupError:
        return ''


def attend(roots: Sequence[int], channel: Channel) -> int | None:
    """Return the wait(2) status of the first root; None if the tree was released before (Cancel), or the daemon is
    gone.

    The other roots are only reaped. None of them is ended by us in any case.
    """
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    with ExitStack() as stack:
        pids = {}
        for pid in roots:
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            pids[pidfd] = pid
            poll.register(pidfd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == channel.fileno():
                    message, fds = channel.receive()
                    for extra in fds:
                        os.close(extra)
                    if isinstance(message, Cancel | None):
                        return None
                    continue
                _, status = os.waitpid(pids[fd], WALL)
                if pids[fd] == roots[0]:
                    return status
                poll.unregister(fd)
