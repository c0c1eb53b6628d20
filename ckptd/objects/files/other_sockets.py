# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets of families and protocols that no kind restores: their names, and what to do about them."""

import socket
from typing import NamedTuple

from ckptd.kernel import families

_FAMILIES: dict[int, str] = {
    socket.AF_UNIX: 'unix', socket.AF_INET: 'IPv4', socket.AF_INET6: 'IPv6', socket.AF_NETLINK: 'netlink',
    socket.AF_PACKET: 'packet', **families.NAMES}
_TYPES: dict[int, str] = {
    socket.SOCK_STREAM: 'stream', socket.SOCK_DGRAM: 'datagram', socket.SOCK_SEQPACKET: 'seqpacket',
    socket.SOCK_RAW: 'raw', socket.SOCK_RDM: 'reliable datagram'}

_PLAIN_TCP = 'let the program use TCP, or close it before the checkpoint'
_OF_DEVICE = 'close it before the checkpoint: its state is in a device, or in other machines'
_HINTS = {
    'vsock': 'close it before the checkpoint: its other end is in another machine, which is not stopped',
    'AF_ALG (kernel crypto)': 'let the program close it (AF_ALG): its keys cannot be read. OpenSSL uses it by the '
                              'engine afalg only',
    'XDP': 'stop the program that reads packets by it (AF_XDP) first: its rings belong to a queue of a device',
    'KCM': 'let the program detach its TCP connections from it (SIOCKCMUNATTACH), and close it',
    'SMC': f'{_PLAIN_TCP} (without smc_run)',
    'SCTP': _PLAIN_TCP, 'DCCP': _PLAIN_TCP, 'RDS': _PLAIN_TCP, 'TIPC': _PLAIN_TCP,
    'L2TP': 'take the tunnel down first (ip l2tp)', 'PPPoX': 'take the PPP connection down first (poff)',
    'PF_KEY (IPsec)': 'stop the key daemon first, or let it use netlink (XFRM)',
    **dict.fromkeys(('Bluetooth', 'CAN', 'NFC', 'IEEE 802.15.4', 'MCTP', 'Phonet', 'QIPCRTR', 'ISDN'), _OF_DEVICE),
}

# names before which 'an' is said
_AN = ('AF_', 'AppleTalk', 'ATM', 'IEEE', 'IPv', 'ISDN', 'IUCV', 'L2TP', 'LLC', 'MCTP', 'NFC', 'RDS', 'RxRPC', 'SCTP',
       'SMC', 'X.25', 'XDP')


class FamilyName(NamedTuple):
    """The names of a socket for people. family: of its protocol, where that says more; '' if it is not known."""
    family: str
    type: str

    @property
    def hint(self) -> str:
        """Advice about it; '' if there is nothing special to say."""
        return _HINTS.get(self.family, '')

    def __str__(self) -> str:
        return f'{self.family} {self.type} socket'


def name_of(family: int, kind: int, protocol: int) -> FamilyName:
    """Return the names for the arguments of socket(2)."""
    if family in (socket.AF_INET, socket.AF_INET6) and protocol in families.PROTOCOL_NAMES:
        name = families.PROTOCOL_NAMES[protocol]
    else:
        name = _FAMILIES.get(family, f'family {family}')
    return FamilyName(name, _TYPES.get(kind, f'type {kind}'))


def article(words: str) -> str:
    """Return 'a' or 'an' for a description that begins with the name of a family."""
    return 'an' if words.startswith(_AN) else 'a'
