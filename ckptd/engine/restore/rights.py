# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files are opened by the caller's rights: of another one than us, with its file-system ids and groups for a moment."""

from contextlib import AbstractContextManager

from ckptd.checks import Caller
from ckptd.kernel.creds import file_rights


def rights_of(caller: Caller) -> AbstractContextManager[None]:
    """Look up and make files as the caller in this block."""
    return file_rights(caller.uid, caller.gid, caller.groups)
