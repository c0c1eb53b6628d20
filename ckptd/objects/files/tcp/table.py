# SPDX-License-Identifier: LGPL-2.1-or-later
"""All TCP sockets of our network namespace, with those that have no fd: they wait to be accepted, or are closed."""

import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import cached_property

from ckptd.kernel import inet
from ckptd.kernel.inet import Address
from ckptd.kernel.inet_diag import DiagSocket, inet_sockets
from ckptd.kernel.unix import Holder, find_holders

_ANY = ('0.0.0.0', '::')


def plain(address: Address) -> Address:
    """Return an address without its IPv6 form, by which both ends of a connection call it alike."""
    return Address(address.plain, address.port)


class TcpTable:
    """The sockets, read when they are needed. Addresses are in their IPv4 form where they have one."""

    def __init__(self) -> None:
        self._holders: dict[int, Holder] = {}

    @cached_property
    def _rows(self) -> list[DiagSocket]:
        with suppress(OSError):
            return inet_sockets(socket.IPPROTO_TCP)
        return []

    @cached_property
    def _connections(self) -> dict[tuple[Address, Address], DiagSocket]:
        return {(plain(one.local), plain(one.peer)): one for one in self._rows
                if one.state not in (inet.TCP_TIME_WAIT, inet.TCP_LISTEN)}

    @cached_property
    def _listeners(self) -> dict[int, list[DiagSocket]]:
        found: dict[int, list[DiagSocket]] = {}
        for one in self._rows:
            if one.state == inet.TCP_LISTEN:
                found.setdefault(one.local.port, []).append(one)
        return found

    def get(self, own: Address, peer: Address) -> DiagSocket | None:
        return self._connections.get((own, peer))

    def look_up_holders(self, pairs: Iterable[tuple[Address, Address]]) -> None:
        """Find the processes that have the other ends of connections, or their listeners, all at once."""
        rows = (row for own, peer in pairs for row in (self.get(peer, own), self.listener(peer)))
        self._holders = find_holders({row.inode for row in rows if row and row.inode})

    def holder(self, inode: int) -> Holder | None:
        """Return a process that has a socket, of those that were looked up."""
        return self._holders.get(inode)

    def listener(self, address: Address) -> DiagSocket | None:
        """Return the listener that has an address, if a connection to it waits to be accepted."""
        found = self._listeners.get(address.port, [])
        exact = [one for one in found if one.local.plain == address.plain]
        return next(iter(exact or [one for one in found if one.local.host in _ANY]), None)

    def clients_outside(self, address: Address, tasks: Collection[int]) -> int:
        """Count the connections to a listener that wait to be accepted, and whose clients are not in the tree. tasks:
        tids of the tree."""
        pairs = [(own, peer) for (own, peer), one in self._connections.items() if not one.inode and
                 own.port == address.port and (address.host in _ANY or own.plain == address.plain)]
        self.look_up_holders(pairs)
        clients = [self.get(peer, own) for own, peer in pairs]
        holders = [self.holder(client.inode) if client else None for client in clients]
        return sum(holder is None or holder.pid not in tasks for holder in holders)

    def is_local(self, address: Address) -> bool:
        """Whether it is an address of this machine."""
        family = socket.AF_INET6 if ':' in address.host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((address.host, 0))
        except OSError:
            return False
        return True
