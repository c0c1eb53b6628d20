# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables that the kernel shows for all objects of a type at once, read at most once per job."""

import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

from ckptd.external import Policies
from ckptd.kernel.creds import CAP_DAC_READ_SEARCH, capget
from ckptd.kernel.inet import netns_cookie
from ckptd.kernel.inet_diag import DiagSocket, inet_sockets
from ckptd.kernel.inotify import watches_of
from ckptd.kernel.netlink import UnixSocket
from ckptd.kernel.unix import sockets_by_inode
from ckptd.objects.files.open_file import OpenFile
from ckptd.objects.files.watched import Neighbourhood, paths_by_handle

if TYPE_CHECKING:
    from ckptd.objects.files.inet.socket import SocketType


def _watched_paths(file: OpenFile, tid: int) -> Mapping[int, str]:
    return paths_by_handle(tid, watches_of(file.info))


class JobTables:
    """The tables for one look at a tree. A running tree changes, so each look has its own."""

    def __init__(self) -> None:
        self.tasks: Collection[int] | None = None       # tids of the tree, None while they are not known
        self.table_owners: Sequence[int] = ()           # tids of the tree, one for each table of fds
        self.socket_types: dict[int, SocketType | None] = {}     # by inode, as far as they were inspected
        self._inet_sockets: dict[int, Mapping[int, DiagSocket]] = {}         # by protocol
        # whether the next one can find files: by CAP_DAC_READ_SEARCH, or through a broker
        self.has_handles = bool(capget().effective >> CAP_DAC_READ_SEARCH & 1)
        self.is_at_rest = False                         # nothing changes while the tables are read
        self.is_taken = False                           # the tree is killed at the end, so Kind.take is called
        self.external = Policies()                      # for peers outside of the tree
        # the paths of the files that an inotify instance watches, by wd, as far as the kernel finds them by handle;
        # paths of the task given. OSError
        self.watched_paths: Callable[[OpenFile, int], Mapping[int, str]] = _watched_paths

    @cached_property
    def unix_sockets(self) -> Mapping[int, UnixSocket]:
        """Unix sockets of our network namespace by inode; none without sock_diag."""
        return sockets_by_inode()

    def may_be_newer(self, file: OpenFile) -> bool:
        """Whether a socket of a running tree may be newer than the table of unix sockets: it is one of our network
        namespace, or is closed."""
        if self.is_at_rest or not self.unix_sockets:
            return False
        try:
            with file.as_socket() as sock, socket.socket(socket.AF_UNIX) as own:
                return (os.fstat(sock.fileno()).st_ino != file.stat.st_ino
                        or (sock.family == socket.AF_UNIX and netns_cookie(sock) == netns_cookie(own)))
        except PermissionError:
            return False
        except OSError:
            return True

    def inet_sockets(self, protocol: int) -> Mapping[int, DiagSocket]:
        """Return the sockets of a protocol (IPPROTO_TCP ...) in our network namespace that have an fd, by inode; none
        without sock_diag."""
        if protocol not in self._inet_sockets:
            self._inet_sockets[protocol] = {}
            with suppress(OSError):
                self._inet_sockets[protocol] = {one.inode: one for one in inet_sockets(protocol) if one.inode}
        return self._inet_sockets[protocol]

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        """The files of the tree, among which the kernel identifies a watched one."""
        return Neighbourhood(self.table_owners)
