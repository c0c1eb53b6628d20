# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thread whose end reports the death of its process.

While one thread of a killed process waits for a file server in close(2), which not even SIGKILL ends, all its files
stay open. So its sockets give no end-of-file, and its pidfd is not readable. The pidfd of another thread is readable
once that thread has ended, except that of the first thread, which waits for all others ("pidfs: improve multi-threaded
exec and premature thread-group leader exit polling", v6.15). So this thread has no other purpose and touches no file.
"""

import errno
import os
import threading

from ckptd.kernel.pidfd import PIDFD_THREAD, pidfd_open


class Liveness:
    """The liveness of this process. pidfd: readable when it is dead; -1 before Linux 6.9, where no thread can have a
    pidfd."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._over.wait, name='witness', daemon=True)
        self._thread.start()
        self.pidfd = _open_thread(self._thread.native_id or 0)

    def close(self) -> None:
        """End the thread. To holders of a copy of the pidfd this looks like the death of the process."""
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
