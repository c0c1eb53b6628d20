# SPDX-License-Identifier: LGPL-2.1-or-later
"""Multicast groups (ip(7)): those of this machine, and whether a socket has joined one, which no list of its groups
shows."""

import errno
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ckptd.kernel.inet import MCAST_MSFILTER
from ckptd.kernel.procfs import read_file
from ckptd.kernel.sockopt import read_option

MCAST_JOIN_GROUP: Final = 42                # <linux/in.h>
MCAST_INCLUDE: Final = 1                    # <linux/in.h>

_STORAGE = 128                              # sizeof(struct __kernel_sockaddr_storage)
_FILTER = struct.Struct(f'=I4x{_STORAGE}sII')       # struct group_filter up to its list of sources
_JOIN = struct.Struct(f'=I4x{_STORAGE}s')           # struct group_req
_FEW, _MANY = 32, 1024                      # sources


class Group(NamedTuple):
    """A multicast group on an interface."""
    family: int
    interface: int
    address: str


class Membership(NamedTuple):
    """The membership of a socket. mode: MCAST_INCLUDE, only these sources; 0 (MCAST_EXCLUDE), all but these."""
    group: Group
    mode: int
    sources: tuple[str, ...]


def groups_of_machine() -> list[Group]:
    """Return all groups that any socket or the kernel itself has joined in our network namespace."""
    return [*parse_igmp(read_file('/proc/self/net/igmp').decode()), *parse_igmp6(_read_igmp6())]


def _read_igmp6() -> str:
    try:
        return read_file('/proc/self/net/igmp6').decode()
    except FileNotFoundError:       # a kernel without IPv6
        return ''


def parse_igmp(text: str) -> Iterator[Group]:
    """Parse /proc/net/igmp: a line of each interface, '2\\teth0 ...', then its groups, '\\t\\t\\t010000E0 ...'."""
    interface = 0
    for line in text.splitlines()[1:]:
        first = line.split()[0]
        if line.startswith('\t'):
            yield Group(socket.AF_INET, interface, socket.inet_ntop(socket.AF_INET, bytes.fromhex(first)[::-1]))
        else:
            interface = int(first)


def parse_igmp6(text: str) -> Iterator[Group]:
    """Parse /proc/net/igmp6: '1 lo ff020000000000000000000000000001 ...'."""
    for line in text.splitlines():
        number, _, address, *_ = line.split()
        yield Group(socket.AF_INET6, int(number), socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))


def membership(sock: socket.socket, group: Group) -> Membership | None:
    """Return the socket's membership of a group; None without one."""
    asked = _FILTER.pack(group.interface, _sockaddr(group.family, group.address), 0, _FEW)
    try:
        answer = _query(sock, group, asked, _FEW)
        count = _FILTER.unpack_from(answer)[3]
        if count > _FEW:
            asked = _FILTER.pack(group.interface, _sockaddr(group.family, group.address), 0, _MANY)
            answer = _query(sock, group, asked, _MANY)
    except OSError as error:
        # EINVAL: IPv6 says so for a socket without any; ENOPROTOOPT: IPv4 on a raw IPv6 socket
        if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENODEV):
            return None
        raise
    _, _, mode, count = _FILTER.unpack_from(answer)
    sources = tuple(_host(answer[at:at + _STORAGE])
                    for at in range(_FILTER.size, min(_FILTER.size + count * _STORAGE, len(answer)), _STORAGE))
    return Membership(group, mode, sources)


def _query(sock: socket.socket, group: Group, asked: bytes, sources: int) -> bytes:
    return read_option(sock, MCAST_MSFILTER, _FILTER.size + sources * _STORAGE, _level(group), asked)


def join(sock: socket.socket, one: Membership) -> None:
    """Join a group, with its filter of sources. OSError."""
    group, level = one.group, _level(one.group)
    sock.setsockopt(level, MCAST_JOIN_GROUP, _JOIN.pack(group.interface, _sockaddr(group.family, group.address)))
    if one.mode == MCAST_INCLUDE or one.sources:
        head = _FILTER.pack(group.interface, _sockaddr(group.family, group.address), one.mode, len(one.sources))
        sock.setsockopt(level, MCAST_MSFILTER,
                        head + b''.join(_sockaddr(group.family, source) for source in one.sources))


def _level(group: Group) -> int:
    return socket.IPPROTO_IP if group.family == socket.AF_INET else socket.IPPROTO_IPV6


def _sockaddr(family: int, host: str) -> bytes:
    packed = socket.inet_pton(family, host)
    gap = 2 if family == socket.AF_INET else 6      # the port; in IPv6 flow information as well
    return (family.to_bytes(2, 'little') + bytes(gap) + packed).ljust(_STORAGE, b'\0')


def _host(address: bytes) -> str:
    family = int.from_bytes(address[:2], 'little')
    return socket.inet_ntop(family, address[4:8] if family == socket.AF_INET else address[8:24])
