# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables that the kernel shows for all objects of a type at once, read at most once per job."""

from collections.abc import Collection, Mapping
from functools import cached_property

from ckptd.kernel.netlink import UnixSocket
from ckptd.kernel.unix import sockets_by_inode


class JobTables:
    """The tables for one look at a tree. A running tree changes, so each look has its own."""

    tasks: Collection[int] | None = None        # tids of the tree, None while they are not known

    @cached_property
    def unix_sockets(self) -> Mapping[int, UnixSocket]:
        """Unix sockets of our network namespace by inode; none without sock_diag."""
        return sockets_by_inode()
