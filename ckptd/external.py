# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policies for connections to peers outside of the tree: `--external=WHAT:ACTION`. Pure.

    WHAT                        the peer
    /run/app.sock               a unix socket bound to this path
    @name                       a unix socket with this abstract name; '@' stands for each NUL, as in ss(8)
    tcp:192.0.2.1:5432          a TCP address and port; tcp:[2001:db8::1]:5432
    udp:192.0.2.1:53            a UDP address and port, to which a socket is connected (inherit only)
    pipe:[123]                  a pipe, as the links of /proc/PID/fd show it (inherit only)
    any                         every peer that no other policy names, but for pipes and UDP

    ACTION                      the connection after a restart
    refuse                      none: the checkpoint is refused (default)
    close                       its peer has closed it
    reconnect                   a new one, to the same path or abstract name
    keep                        the same one, if root restores it within a quarter of an hour after "checkpoint --kill";
                                else as with close (TCP only)
    inherit                     a file that the caller of the restart gives for WHAT; a restart without is refused
"""

import ipaddress
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple, cast, get_args

from ckptd.errors import InvalidArgument

Action = Literal['refuse', 'close', 'reconnect', 'keep', 'inherit']
ACTIONS: Final = get_args(Action)
ANY: Final = 'any'
TCP: Final = 'tcp:'
UDP: Final = 'udp:'
MAX_POLICIES: Final = 64
MAX_WHAT: Final = 512          # characters; sun_path has 108 bytes, unix(7)
MAX_INHERITED: Final = 15      # file descriptors for one restart; a call has 16, and one may be a terminal
_PIPE: Final = re.compile(r'pipe:\[\d{1,20}\]', re.ASCII)       # pipe(7)
_ONLY_NAMES = ('reconnect',)        # actions that need a path or an abstract name
_ONLY_TCP = ('keep',)
_ONLY_INHERITED: Final = ('pipe:', UDP)       # beginnings of peers


class Policy(NamedTuple):
    """One policy. str() gives the text that `parse` takes."""
    what: str       # as `unix_peer` and `tcp_peer` return it, or ANY
    action: Action

    def __str__(self) -> str:
        return f'{self.what}:{self.action}'


def parse(text: str) -> Policy:
    """Parse WHAT:ACTION. InvalidArgument."""
    what, colon, action = text.rpartition(':')
    if not colon or action not in ACTIONS:
        raise InvalidArgument(f'{text[:MAX_WHAT]!r} is not WHAT:ACTION', resource='external',
                              hint=f'ACTION is one of {", ".join(ACTIONS)}')
    policy = Policy(parse_what(what), cast(Action, action))
    if policy.what.startswith(TCP) and policy.action in _ONLY_NAMES:
        raise InvalidArgument(f'{text[:MAX_WHAT]!r}: only a unix socket can be connected again by its name',
                              resource='external', hint='use close or keep')
    if policy.what.startswith(_ONLY_INHERITED) and policy.action != 'inherit':
        raise InvalidArgument(f'{text[:MAX_WHAT]!r}: pipes and UDP sockets can only be inherited', resource='external',
                              hint='without a policy, a restart closes the other end of a pipe, and connects a UDP '
                                   'socket again')
    if policy.action in _ONLY_TCP and policy.what != ANY and not policy.what.startswith(TCP):
        raise InvalidArgument(f'{text[:MAX_WHAT]!r}: only a TCP connection can be kept', resource='external',
                              hint='use close or reconnect')
    return policy


def is_policy(text: object) -> bool:
    """Whether `parse` takes this value."""
    try:
        return isinstance(text, str) and bool(parse(text))
    except InvalidArgument:
        return False


def is_what(text: str) -> bool:
    """Whether `parse_what` takes this text."""
    try:
        return bool(parse_what(text))
    except InvalidArgument:
        return False


def parse_what(text: str) -> str:
    """Return the only spelling of a peer. InvalidArgument."""
    if text == ANY or (len(text) <= MAX_WHAT and '\0' not in text and text[:1] in ('/', '@') and len(text) > 1):
        return text
    if _PIPE.fullmatch(text):
        return text
    protocol, _, rest = text.partition(':')
    address, _, port = rest.rpartition(':')
    if protocol in ('tcp', 'udp') and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16:
        try:
            return _inet_peer(f'{protocol}:', address.removeprefix('[').removesuffix(']'), int(port))
        except ValueError:
            pass        # the message is that for all other texts
    raise InvalidArgument(f'{text[:MAX_WHAT]!r} is no peer', resource='external',
                          hint=f'it is a path, @NAME, {TCP}ADDRESS:PORT, {UDP}ADDRESS:PORT, pipe:[NUMBER], or {ANY}')


def parse_inherited(text: str) -> tuple[str, int]:
    """Parse WHAT=FD: a peer, and the number of an open file descriptor. InvalidArgument."""
    what, _, number = text.rpartition('=')
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        raise InvalidArgument(f'{text[:MAX_WHAT]!r} is not WHAT=FD', resource='inherit',
                              hint='FD is the number of an open file descriptor')
    return parse_what(what), int(number)


def parse_list(text: str) -> tuple[str, ...]:
    """Parse policies that are separated by spaces, as in a configuration file; a shell's quotes may be used.
    ValueError."""
    try:
        return tuple(str(parse(word)) for word in shlex.split(text))
    except InvalidArgument as error:
        raise ValueError(error.message) from error


def unix_peer(name: bytes) -> str:
    """Return WHAT for the name that a unix socket is bound to; '' for none. An abstract name begins with NUL."""
    return os.fsdecode(name.replace(b'\0', b'@'))


def tcp_peer(address: str, port: int) -> str:
    """Return WHAT for a TCP address. ValueError."""
    return _inet_peer(TCP, address, port)


def udp_peer(address: str, port: int) -> str:
    """Return WHAT for a UDP address. ValueError."""
    return _inet_peer(UDP, address, port)


def _inet_peer(protocol: str, address: str, port: int) -> str:
    parsed = ipaddress.ip_address(address)
    return f'{protocol}[{parsed}]:{port}' if parsed.version == 6 else f'{protocol}{parsed}:{port}'


class Policies:
    """The policies of one job. Of two policies for one peer the later counts."""

    def __init__(self, policies: Iterable[Policy] = ()) -> None:
        self._actions: Mapping[str, Action] = dict(policies)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> 'Policies':
        """Parse several texts. InvalidArgument."""
        return cls(map(parse, texts))

    def action_of(self, what: str) -> Action:
        """Return the action for a peer; '' is a peer without a name."""
        return self._actions.get(what) or self._actions.get(ANY, 'refuse')

    def inherits(self, what: str) -> bool:
        """Whether a policy names exactly this pipe or UDP peer, which the caller of a restart gives."""
        return self._actions.get(what) == 'inherit'
