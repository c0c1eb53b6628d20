# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel tells of all objects of a sort at once, asked at most once in a job."""

from collections.abc import Mapping
from functools import cached_property

from ckptd.kernel.netlink import UnixSocket
from ckptd.kernel.unix import sockets_by_inode


class JobTables:
    """Tables of one look at a tree. A running tree changes, so each look at one makes its own."""

    @cached_property
    def unix_sockets(self) -> Mapping[int, UnixSocket]:
        """Unix sockets of our network namespace by inode; none where there is no sock_diag."""
        return sockets_by_inode()
