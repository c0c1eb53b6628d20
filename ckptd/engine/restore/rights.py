# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files are opened by the caller's rights: of another one than us, with its file-system ids and groups for a moment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ckptd.checks import Caller
from ckptd.kernel.creds import setfsgid, setfsuid


@contextmanager
def rights_of(caller: Caller) -> Iterator[None]:
    """Look up and make files as the caller in this block. Root's way around permissions goes with the file-system uid
    (capabilities(7), "Effect of user ID changes on capabilities"), and is not missed where the caller is we."""
    if caller.uid == os.geteuid():
        yield
        return
    groups = os.getgroups()
    os.setgroups(caller.groups)
    try:
        setfsgid(caller.gid)
        setfsuid(caller.uid)
        yield
    finally:
        setfsuid(os.geteuid())
        setfsgid(os.getegid())
        os.setgroups(groups)
