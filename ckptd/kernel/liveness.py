# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thread whose end tells of its process's death.

While one thread of a killed process waits for a file server in close(2), which not even SIGKILL ends, all its files
stay open, so that no end-of-file comes from it, and its pidfd is not readable. That of a thread is, once that thread
has ended; but not the first thread's, which waits for all others ("pidfs: improve multi-threaded exec and premature
thread-group leader exit polling", v6.15). So this one is there for nothing else, and touches no file.
"""

import errno
import os
import threading

from ckptd.kernel.pidfd import PIDFD_THREAD, pidfd_open


class Liveness:
    """Of this process. pidfd: readable when it is dead; -1 where no thread can have one, before Linux 6.9."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._over.wait, name='witness', daemon=True)
        self._thread.start()
        self.pidfd = _open_thread(self._thread.native_id or 0)

    def close(self) -> None:
        """The same as death, to whoever has a copy of the pidfd."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self._over.set()
        self._thread.join()


def _open_thread(tid: int) -> int:
    try:
        return pidfd_open(tid, PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1
