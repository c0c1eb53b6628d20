# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys in session keyrings, session-keyring(7)."""

import ctypes
import os
from typing import Final

libc = ctypes.CDLL(None, use_errno=True)

# <asm/unistd_64.h>, <linux/keyctl.h>
NR_ADD_KEY: Final = 248
NR_KEYCTL: Final = 250
KEYCTL_JOIN_SESSION_KEYRING: Final = 1
KEYCTL_SEARCH: Final = 10
KEY_SPEC_SESSION_KEYRING: Final = -3

KEY, SECRET = b'ckptd-test', b'of root'


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def join_session_keyring() -> int:
    """A new session keyring, for this process and what it starts."""
    return _check(libc.syscall(NR_KEYCTL, KEYCTL_JOIN_SESSION_KEYRING, None))


def add_key(description: bytes, payload: bytes) -> int:
    """A key of type user in the session keyring; its number."""
    return _check(libc.syscall(NR_ADD_KEY, b'user', description, payload, len(payload), KEY_SPEC_SESSION_KEYRING))
