# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on internet sockets, and on unix sockets with names."""

import socket
import struct

from hypothesis import strategies as st

from tests.generated.files import number
from tests.generated.programs import Program, operation

HOSTS = {socket.AF_INET: ('127.0.0.1', '0.0.0.0', '127.3.2.1'), socket.AF_INET6: ('::1', '::', '::ffff:127.0.0.1')}
# TCP, MPTCP, UDP, UDP-Lite, ping and raw sockets: type and protocol
SORTS = ((1, 0), (1, 262), (2, 0), (2, 136), (3, 255), (3, 1), (3, 58), (2, 1))
LEVELS = {0: 60, 41: 85, 6: 40, 17: 105}        # IPPROTO_IP, IPV6, TCP, UDP: options below
UNIX_NAMES = (b'bound', b'./directory/bound', b'\0generated-%d', b'')


def address(family: int, host: int, port: int) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    name = HOSTS[family][host]
    packed = socket.inet_pton(family, name)
    if family == socket.AF_INET:
        return struct.pack('=H', family) + struct.pack('!H', port) + packed + bytes(8)
    return struct.pack('=H', family) + struct.pack('!HI', port, 0) + packed + bytes(4)


@operation(family=st.sampled_from([2, 10]), sort=st.sampled_from(SORTS), flags=st.sampled_from([0, 0o4000, 0o2000000]))
def make_internet_socket(program: Program, family: int, sort: tuple[int, int], flags: int) -> None:
    program.add_file(program.call('socket', family, sort[0] | flags, sort[1]))


@operation(file=number, family=st.sampled_from([2, 10]), host=st.integers(0, 2), reuse=st.sampled_from([0, 2, 15]))
def bind_socket(program: Program, file: int, family: int, host: int, reuse: int) -> None:
    """To a port that the kernel chooses. reuse: SO_REUSEADDR, SO_REUSEPORT."""
    if reuse:
        program.call('setsockopt', program.file(file), 1, reuse, struct.pack('<i', 1), 4)
    where = address(family, host, 0)
    program.call('bind', program.file(file), where, len(where))


@operation(file=number, backlog=st.sampled_from([0, 1, 128, 10**6]))
def listen(program: Program, file: int, backlog: int) -> None:
    program.call('listen', program.file(file), backlog)


@operation(file=number, family=st.sampled_from([2, 10]), host=st.integers(0, 1))
def connect_datagrams(program: Program, file: int, family: int, host: int) -> None:
    """To port 9, where nobody listens: a TCP socket gets ECONNREFUSED."""
    where = address(family, host, 9)
    program.call('connect', program.file(file), where, len(where))


@operation(file=number, level=st.sampled_from(sorted(LEVELS)), option=st.integers(1, 105),
           value=st.sampled_from([0, 1, 2, 3, 60, 1400, 100_000]), size=st.sampled_from([4, 4, 4, 1, 8]))
def set_option(program: Program, file: int, level: int, option: int, value: int, size: int) -> None:
    # TCP_REPAIR and its relatives are no options that programs set, and TCP_ULP takes a name
    if level != 6 or option not in (19, 20, 21, 22, 29, 31):
        program.call('setsockopt', program.file(file), level, option % LEVELS[level],
                     struct.pack('<ii', value, value), size)


@operation(name=st.sampled_from([b'cubic', b'reno']), file=number)
def set_congestion_control(program: Program, file: int, name: bytes) -> None:
    program.call('setsockopt', program.file(file), 6, 13, name, len(name))


@operation(kind=st.sampled_from([1, 2, 5]), flags=st.sampled_from([0, 0o4000]), name=st.sampled_from(UNIX_NAMES),
           backlog=st.sampled_from([-1, 0, 5]), gone=st.booleans())
def make_named_socket(program: Program, kind: int, flags: int, name: bytes, backlog: int, gone: bool) -> None:
    """Bound to a path, an abstract name or a name that the kernel chooses, and perhaps listening."""
    file = program.call('socket', 1, kind | flags, 0)
    has_path = name[:1] not in (b'', b'\0')
    where = struct.pack('=H', 1) + name.replace(b'%d', b'%d' % len(program.lines)) + b'\0' * has_path
    program.call('bind', file, where, len(where))
    if backlog >= 0:
        program.call('listen', file, backlog)
    if gone and has_path:
        program.call('unlink', name + b'\0')
    program.add_file(file)


@operation(kind=st.sampled_from([1, 5]), accept=st.booleans(), client_bound=st.booleans())
def connect_by_name(program: Program, kind: int, accept: bool, client_bound: bool) -> None:
    """A listener, and a client of it that it may have accepted."""
    where = struct.pack('=H', 1) + b'\0generated-%d' % len(program.lines)
    listener = program.call('socket', 1, kind, 0)
    program.call('bind', listener, where, len(where))
    program.call('listen', listener, 3)
    client = program.call('socket', 1, kind, 0)
    if client_bound:
        program.call('bind', client, struct.pack('=H', 1), 2)
    program.call('connect', client, where, len(where))
    program.add_file(listener, client)
    if accept:
        program.add_file(program.call('accept4', listener, 0, 0, 0))
