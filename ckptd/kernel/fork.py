# SPDX-License-Identifier: LGPL-2.1-or-later
"""fork(2) for a child that only makes system calls and calls _exit()."""

import os
import warnings


def quiet_fork() -> int:
    """Call fork(2) without the warning of Python 3.12 that another thread may hold a lock.

    The child must not take a lock: it waits for ever for a lock that another thread holds during the fork.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        return os.fork()
