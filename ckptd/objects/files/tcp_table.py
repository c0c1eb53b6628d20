# SPDX-License-Identifier: LGPL-2.1-or-later
"""All TCP sockets of our network namespace, with those that have no fd: they wait to be accepted, or are closed."""

import socket
from contextlib import suppress

from ckptd.kernel import inet
from ckptd.kernel.inet import Address
from ckptd.kernel.inet_diag import DiagSocket, inet_sockets


def plain(address: Address) -> Address:
    """Return an address without its IPv6 form, by which both ends of a connection call it alike."""
    return Address(address.plain, address.port)


class TcpTable:
    """The sockets, read when they are needed. Addresses are in their IPv4 form where they have one."""

    def __init__(self) -> None:
        self._rows: list[DiagSocket] | None = None

    def _all(self) -> list[DiagSocket]:
        if self._rows is None:
            self._rows = []
            with suppress(OSError):
                self._rows = inet_sockets(socket.IPPROTO_TCP)
        return self._rows

    def get(self, own: Address, peer: Address) -> DiagSocket | None:
        return next((one for one in self._all() if one.state != inet.TCP_TIME_WAIT
                     and (plain(one.local), plain(one.peer)) == (own, peer)), None)

    def listener(self, address: Address) -> DiagSocket | None:
        """Return the listener that has an address, if a connection to it waits to be accepted."""
        found = [one for one in self._all() if one.state == inet.TCP_LISTEN and one.local.port == address.port]
        exact = [one for one in found if one.local.plain == address.plain]
        return next(iter(exact or [one for one in found if one.local.host in ('0.0.0.0', '::')]), None)

    def is_local(self, address: Address) -> bool:
        """Whether it is an address of this machine."""
        family = socket.AF_INET6 if ':' in address.host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((address.host, 0))
        except OSError:
            return False
        return True
