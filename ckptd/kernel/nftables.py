# SPDX-License-Identifier: LGPL-2.1-or-later
"""nftables: a table that drops the packets of single TCP connections until a deadline (nft(8)).

    table inet NAME {
        set four { type ipv4_addr . inet_service . ipv4_addr . inet_service; timeout }
        set six  { type ipv6_addr . inet_service . ipv6_addr . inet_service; timeout }
        chain in  { hook prerouting, priority raw: source and destination in four or six: drop }
        chain out { hook output, priority raw: the same }
    }

The kernel removes an element at its deadline, so no process has to be there for that. pyroute2 encodes the messages;
the socket is a plain one with a timeout.
"""

import errno
import functools
import importlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address
from typing import Any, NamedTuple

NETLINK_NETFILTER = 12                          # <linux/netlink.h>
NFNL_SUBSYS_NFTABLES = 10                       # <linux/netfilter/nfnetlink.h>
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 16, 17
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10     # <linux/netfilter.h>
NF_DROP = 0
# <linux/netfilter/nf_tables.h>
NFT_MSG_NEWTABLE, NFT_MSG_GETTABLE, NFT_MSG_DELTABLE = 0, 1, 2
NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM = 3, 6, 9, 12
_REQUEST, _ACK, _CREATE, _APPEND, _DUMP = 0x1, 0x4, 0x400, 0x800, 0x300
_ERROR, _DONE = 2, 3
_HOOKS = {'in': 0, 'out': 3}                    # NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT
_RAW = -300                                     # NF_IP_PRI_RAW: before connection tracking
_HEADER = struct.Struct('=IHHII')               # struct nlmsghdr
_ANSWER_TIMEOUT = 2.0                           # seconds; the kernel answers within sendto(2)
_IPV4_ADDR, _IPV6_ADDR, _INET_SERVICE = 7, 8, 13        # types as nft(8) numbers them, for its listing
# registers of 4 bytes: NFT_REG32_00 and following
_REGISTER = 8


class TcpEnds(NamedTuple):
    """The two ends of a TCP connection: (address, port). The addresses are of one family, IPv4 or IPv6."""
    local: tuple[str, int]
    remote: tuple[str, int]


class _Family(NamedTuple):
    """The layout of an address family. offset: of the source address in the header; size: of an address."""
    name: str
    protocol: int
    offset: int
    size: int
    address_type: int

    @property
    def key_type(self) -> int:
        """The type of the concatenated key; nft(8) puts six bits of each part together."""
        return functools.reduce(lambda high, low: high << 6 | low, [self.address_type, _INET_SERVICE] * 2)

    @property
    def key_size(self) -> int:
        return 2 * (self.size + 4)      # a port takes a register of 4 bytes


_FAMILIES = (_Family('four', NFPROTO_IPV4, 12, 4, _IPV4_ADDR), _Family('six', NFPROTO_IPV6, 8, 16, _IPV6_ADDR))


def drop_connections(table: str, connections: Iterable[TcpEnds], timeout_ms: int) -> None:
    """Drop the packets of connections in both directions for `timeout_ms` milliseconds, in our net namespace.

    A table of that name is replaced.

    OSError: EPERM without CAP_NET_ADMIN, EOPNOTSUPP or EPROTONOSUPPORT if the kernel has no nftables.
    """
    # one that is there is removed, for which there must be one
    messages = [_message('table', kind, NFTA_TABLE_NAME=table)
                for kind in (NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWTABLE)]
    for number, family in enumerate(_FAMILIES):
        messages.append(_message('set', NFT_MSG_NEWSET, NFTA_SET_TABLE=table, NFTA_SET_NAME=family.name,
                                 NFTA_SET_FLAGS={'NFT_SET_TIMEOUT'}, NFTA_SET_KEY_TYPE=family.key_type,
                                 NFTA_SET_KEY_LEN=family.key_size, NFTA_SET_ID=number + 1))
    for chain, hook in _HOOKS.items():
        messages.append(_message(
            'chain', NFT_MSG_NEWCHAIN, NFTA_CHAIN_TABLE=table, NFTA_CHAIN_NAME=chain, NFTA_CHAIN_TYPE='filter',
            NFTA_CHAIN_HOOK=_attributes(NFTA_HOOK_HOOKNUM=hook, NFTA_HOOK_PRIORITY=_RAW)))
        messages += [_message('rule', NFT_MSG_NEWRULE, NFTA_RULE_TABLE=table, NFTA_RULE_CHAIN=chain,
                              NFTA_RULE_EXPRESSIONS=_drop(family)) for family in _FAMILIES]
    found = list(connections)
    for family in _FAMILIES:
        if elements := [_element(key, timeout_ms) for key in _keys(found, family)]:
            messages.append(_message('set_elem_list', NFT_MSG_NEWSETELEM, NFTA_SET_ELEM_LIST_TABLE=table,
                                     NFTA_SET_ELEM_LIST_SET=family.name, NFTA_SET_ELEM_LIST_ELEMENTS=elements))
    _batch(messages)


def remove_table(table: str) -> bool:
    """Remove a table and all that is in it. Return False if there is none. OSError."""
    try:
        _batch([_message('table', NFT_MSG_DELTABLE, NFTA_TABLE_NAME=table)])
    except FileNotFoundError:
        return False
    return True


def tables() -> list[str]:
    """Return the names of the inet tables of our net namespace. OSError: EPERM without CAP_NET_ADMIN."""
    message = _message('table', NFT_MSG_GETTABLE)
    message['header']['flags'] = _REQUEST | _DUMP
    names = []
    with _connected() as sock:
        sock.send(_encoded(message))
        for kind, payload in _answers(sock):
            if kind == _DONE:
                break
            _raise_error(kind, payload)
            answer = _nftsocket().nft_table_msg(payload)
            answer.decode()
            names.append(str(answer.get_attr('NFTA_TABLE_NAME')))
    return names


# ---------------------------------------------------------------- messages

@functools.cache
def _nftsocket() -> Any:
    # it takes 0.3 s to import
    return importlib.import_module('pyroute2.netlink.nfnetlink.nftsocket')


def _attributes(**values: Any) -> dict[str, list[tuple[str, Any]]]:
    return {'attrs': list(values.items())}


def _message(name: str, kind: int, **values: Any) -> Any:
    message = getattr(_nftsocket(), f'nft_{name}_msg')()
    message['attrs'] = list(values.items())
    message['nfgen_family'] = NFPROTO_INET
    message['header']['type'] = NFNL_SUBSYS_NFTABLES << 8 | kind
    message['header']['flags'] = _REQUEST | _ACK | (_CREATE | _APPEND if kind != NFT_MSG_DELTABLE else 0)
    return message


def _edge(kind: int) -> Any:
    message = _nftsocket().nfgen_msg()
    message['res_id'] = NFNL_SUBSYS_NFTABLES
    message['header']['type'] = kind
    message['header']['flags'] = _REQUEST
    return message


def _encoded(message: Any) -> bytes:
    message.encode()
    return bytes(message.data)


def _drop(family: _Family) -> list[Any]:
    """Return the expressions of a rule: IP version, TCP, the four parts of the key, the look into the set, the
    verdict."""
    meta = _nftsocket().Meta
    parts = ((1, family.offset, family.size), (2, 0, 2), (1, family.offset + family.size, family.size), (2, 2, 2))
    loads, register = [], _REGISTER
    for base, offset, size in parts:        # NFT_PAYLOAD_NETWORK_HEADER 1, NFT_PAYLOAD_TRANSPORT_HEADER 2
        loads.append(_expression('payload', dreg=register, base=base, offset=offset, len=size))
        register += max(size, 4) // 4
    verdict = _attributes(NFTA_DATA_VERDICT=_attributes(NFTA_VERDICT_CODE=NF_DROP))
    return [*_is(meta.NFT_META_NFPROTO, family.protocol), *_is(meta.NFT_META_L4PROTO, socket.IPPROTO_TCP), *loads,
            _expression('lookup', set=family.name, sreg=_REGISTER), _expression('immediate', dreg=0, data=verdict)]


def _is(key: int, value: int) -> list[Any]:
    return [_expression('meta', key=key, dreg=_REGISTER),
            _expression('cmp', sreg=_REGISTER, op=0, data=_attributes(NFTA_DATA_VALUE=bytes([value])))]


def _expression(name: str, **values: Any) -> Any:
    data = _attributes(**{f'NFTA_{name.upper()}_{key.upper()}': value for key, value in values.items()})
    return _attributes(NFTA_EXPR_NAME=name, NFTA_EXPR_DATA=data)


def _keys(connections: Sequence[TcpEnds], family: _Family) -> Iterator[bytes]:
    """Yield the keys of both directions."""
    for local, remote in connections:
        ends = [(ip_address(host).packed, port) for host, port in (local, remote)]
        if len(ends[0][0]) == family.size:
            for (source, sport), (destination, dport) in (ends, reversed(ends)):
                yield source + struct.pack('!H2x', sport) + destination + struct.pack('!H2x', dport)


def _element(key: bytes, timeout_ms: int) -> Any:
    return _attributes(NFTA_SET_ELEM_KEY=_attributes(NFTA_DATA_VALUE=key), NFTA_SET_ELEM_TIMEOUT=timeout_ms)


# ---------------------------------------------------------------- the socket

def _connected() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    sock.settimeout(_ANSWER_TIMEOUT)
    sock.connect((0, 0))
    return sock


def _batch(messages: Sequence[Any]) -> None:
    """Carry out all messages or none. OSError."""
    data = b''.join(map(_encoded, (_edge(NFNL_MSG_BATCH_BEGIN), *messages, _edge(NFNL_MSG_BATCH_END))))
    with _connected() as sock:
        sock.send(data)
        answers = _answers(sock)
        for _ in messages:
            _raise_error(*next(answers))


def _answers(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yield (type, whole message) of each answer."""
    while True:
        data = sock.recv(1 << 16)
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            yield kind, data[:length]
            data = data[length + 3 & ~3:]


def _raise_error(kind: int, message: bytes) -> None:
    if kind == _ERROR:
        number = -struct.unpack_from('=i', message, _HEADER.size)[0]
        if number:
            raise OSError(number, os.strerror(number), 'nftables')
    elif kind == _DONE:
        raise OSError(errno.EPROTO, 'the answer of nftables ends early')
