# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keyrings of the calling process (keyctl(2))."""

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_long, c_ulong, c_void_p, syscall

# <linux/keyctl.h>
KEYCTL_GET_KEYRING_ID = 0
KEYCTL_JOIN_SESSION_KEYRING = 1
KEYCTL_LINK = 8
KEYCTL_READ = 11
KEY_SPEC_THREAD_KEYRING, KEY_SPEC_PROCESS_KEYRING = -1, -2
KEY_SPEC_SESSION_KEYRING = -3
KEY_SPEC_USER_KEYRING, KEY_SPEC_USER_SESSION_KEYRING = -4, -5


@syscall(NR['keyctl'])
def _keyctl(operation: c_int, arg2: c_void_p = None, arg3: c_long = 0, arg4: c_ulong = 0, arg5: c_ulong = 0
            ) -> c_long: ...


def join_new_session_keyring() -> None:
    """Take a new, empty session keyring of the own uid, linked to the user keyring. OSError: ENOSYS, EDQUOT."""
    _keyctl(KEYCTL_JOIN_SESSION_KEYRING)
    _keyctl(KEYCTL_LINK, KEY_SPEC_USER_KEYRING, KEY_SPEC_SESSION_KEYRING)
