# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd where root's session has keys: in a session keyring of its own with one in it, as after a login of root's."""

import sys

from ckptd import daemon
from tests.security.keyring import KEY, SECRET, add_key, join_session_keyring

if __name__ == '__main__':
    join_session_keyring()
    add_key(KEY, SECRET)
    sys.exit(daemon.main())
