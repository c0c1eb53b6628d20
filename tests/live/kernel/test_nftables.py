# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packets of single connections are dropped, in a net namespace of the test's own."""

import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ckptd.kernel.nftables import TcpEnds, drop_connections, remove_table, tables
from ckptd.kernel.timens import unshare

pytestmark = [pytest.mark.needs('root'), pytest.mark.timeout(60)]

TABLE = 'ckptd-test'
CLONE_NEWNET = 0x40000000               # <linux/sched.h>
SIOCSIFFLAGS, IFF_UP = 0x8914, 1        # <linux/sockios.h>, <linux/if.h>
HOSTS = {socket.AF_INET: '127.0.0.1', socket.AF_INET6: '::1'}


def new_net() -> None:
    unshare(CLONE_NEWNET)
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack('16sh22x', b'lo', IFF_UP))


@contextmanager
def connected(family: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server((HOSTS[family], 0), family=family) as server, socket.socket(family) as client:
        client.connect(server.getsockname()[:2])
        with server.accept()[0] as accepted:
            yield client, accepted


def connection(sock: socket.socket) -> TcpEnds:
    return TcpEnds(sock.getsockname()[:2], sock.getpeername()[:2])


def arrives(sock: socket.socket, seconds: float) -> bool:
    return bool(select.select([sock], [], [], seconds)[0])


def one_connection_of_two(family: int) -> None:
    new_net()
    with connected(family) as (client, accepted), connected(family) as (other, free):
        drop_connections(TABLE, [connection(client)], 60_000)
        assert tables() == [TABLE]
        client.send(b'waits')
        accepted.send(b'waits too')
        other.send(b'goes')
        assert arrives(free, 5)
        assert not arrives(accepted, 0.3)
        assert not arrives(client, 0)
        assert remove_table(TABLE)
        assert arrives(accepted, 10)
        assert arrives(client, 10)
        assert tables() == []
        assert not remove_table(TABLE)


def until_the_deadline() -> None:
    new_net()
    with connected(socket.AF_INET) as (client, accepted):
        drop_connections(TABLE, [connection(accepted)], 400)
        client.send(b'later')
        assert not arrives(accepted, 0.1)
        assert arrives(accepted, 10)


def made_twice() -> None:
    new_net()
    with connected(socket.AF_INET) as (client, accepted):
        drop_connections(TABLE, [connection(client)], 60_000)
        drop_connections(TABLE, [], 60_000)
        client.send(b'goes')
        assert arrives(accepted, 5)


def without_the_right() -> None:
    new_net()
    assert tables() == []       # pyroute2 is imported with root's rights
    os.setresuid(65534, 65534, 65534)
    with pytest.raises(PermissionError):
        drop_connections(TABLE, [], 1000)
    with pytest.raises(PermissionError):
        remove_table(TABLE)


@pytest.mark.parametrize('family', HOSTS, ids=['IPv4', 'IPv6'])
def test_one_connection_of_two_is_dropped(forked: Callable[..., int], family: int) -> None:
    forked(lambda: one_connection_of_two(family))


@pytest.mark.parametrize('work', [until_the_deadline, made_twice, without_the_right])
def test_the_table(forked: Callable[..., int], work: Callable[[], None]) -> None:
    forked(work)
