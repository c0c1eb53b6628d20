# SPDX-License-Identifier: LGPL-2.1-or-later
# mypy: allow-untyped-calls
"""dbus-next 0.2.3 as a wire layer: address, SASL and marshalling. No other module imports it.

ckptd uses `Message` to make messages, `Variant`, the signature parser, the (un)marshaller, and the connecting half of
`MessageBus`. It does not use the library's reader, writer, dispatch and ServiceInterface, because they let any client
on the bus stop or disconnect the daemon. stream.py, connection.py and router.py replace them.

    message = endian u8:type u8:flags u8:1 u32:body_length u32:serial a(yv):fields pad8 body
"""

import functools
import io
import os
import socket
import struct
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

if not hasattr(typing, 'no_type_check_decorator'):
    # Python 3.15 removed it (deprecated since 3.13), and dbus_next.service imports it at the top, so the import would
    # fail. It only marked annotations as "not types", so a decorator that does nothing replaces it.
    typing.no_type_check_decorator = lambda decorator: decorator

# these imports need the replacement above
from dbus_next._private.address import get_system_bus_address, parse_address
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag as _Flag
from dbus_next.constants import MessageType as _Type
from dbus_next.errors import AuthError
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, SignatureType, Variant
from dbus_next.validators import is_object_path_valid

from ckptd.bus.message import ALLOW_INTERACTIVE, NO_REPLY_EXPECTED, Fds, MessageType, ProtocolError, UnixFd
from ckptd.errors import LimitsExceeded

__all__ = ['AuthError', 'Message', 'SignatureType', 'Variant', 'is_object_path_valid']

MAX_SENT: Final = 16 << 20          # half of what a system bus accepts; the bus disconnects a sender of more
MAX_BODY: Final = 256 << 10         # of a method call or signal; decoding is pure Python, some 2 MB/s
MAX_VALUES: Final = 500             # in a method call: decoding takes some 2 us for each
MAX_VARIANT: Final = 16             # characters of the signature of a variant in a method call; no option has more
MAX_SIGNATURES: Final = 1024
LINE_LIMIT: Final = 4096

# arrays of these are decoded in one go; D-Bus type -> struct code
_NUMBERS = {'n': 'h', 'q': 'H', 'i': 'i', 'u': 'I', 'x': 'q', 't': 'Q', 'd': 'd'}

# messages of the library are little-endian
_FIXED = struct.Struct('<4sIII')            # endian to version, body_length, serial, bytes of the fields
_NUMBER = struct.Struct('<BBBBI')           # (yv): number of the field, a variant of signature 'u', its value; or 's',
                                            # and the bytes of the string behind that
_ERROR_HEAD = bytes([ord('l'), MessageType.ERROR, NO_REPLY_EXPECTED, 1])


@dataclass(frozen=True, slots=True)
class ReadyError:
    """An error message that answers many calls. Its fields and body are marshalled once; serial numbers and address are
    added for each call."""
    fields: bytes
    body: bytes

    def to(self, call: 'Received', serial: int) -> bytes:
        """Return the bytes of the answer to one call."""
        fields = self.fields + _NUMBER.pack(5, 1, ord('u'), 0, call.serial) + _text(6, call.sender)
        return (_FIXED.pack(_ERROR_HEAD, len(self.body), serial, len(fields)) + fields + bytes(-len(fields) % 8)
                + self.body)


@dataclass(slots=True, eq=False)
class Received:
    """A message from the bus. The body stays bytes until a reader that knows its expected signature asks for it."""
    type: int
    flags: int
    serial: int
    endian: int
    length: int
    path: str = ''
    interface: str = ''
    member: str = ''
    error_name: str = ''
    reply_serial: int = 0
    destination: str = ''
    sender: str = ''
    signature: str = ''
    fd_count: int = 0
    fds: Fds = field(default_factory=Fds)
    raw: bytes | bytearray | None = b''         # None: longer than the reader takes, so it was dropped
    _decoded: list[Any] | None = None

    @property
    def wants_reply(self) -> bool:
        return self.type == MessageType.CALL and not self.flags & NO_REPLY_EXPECTED

    @property
    def interactive(self) -> bool:
        """Whether the sender waits long enough for a person to be asked."""
        return bool(self.flags & ALLOW_INTERACTIVE)

    def body(self) -> list[Any]:
        """Decode the arguments to plain values. ProtocolError if the body does not match its signature."""
        if self.raw is None:
            raise ProtocolError(f'a body of {self.length} bytes was not read')
        if self._decoded is not None:
            return self._decoded
        try:
            kind = _Arguments if self.type == MessageType.CALL else _Body
            self._decoded = kind(self.raw, self.endian, self.fds).arguments(self.signature)
            return self._decoded
        except (EOFError, ValueError, TypeError, struct.error, RecursionError, IndexError) as error:
            raise ProtocolError(f'malformed body: {error}') from error


class _Body(Unmarshaller):
    """The library's decoder, over bytes in memory and with plain values: a variant is its content, 'h' is the fd."""

    def __init__(self, data: bytes | bytearray, endian: int, fds: Fds | None = None) -> None:
        super().__init__(io.BytesIO())      # an empty stream, so that reading past the end is EOFError
        self.buf, self.endian, self._fds = bytearray(data), endian, fds or Fds()
        self.readers['h'] = self._read_fd

    def _read_fd(self, _: object = None) -> UnixFd:
        return self._fds[self.read_uint32()]

    def read_variant(self, _: object = None) -> Any:
        [kind] = parse_signature(self.read_signature())
        return self.read_argument(kind)

    def read_array(self, kind: SignatureType) -> Any:
        code = _NUMBERS.get(kind.children[0].token)
        if code is None:
            return super().read_array(kind)
        # item by item, 256 KiB of them would take the loop a tenth of a second
        length = self.read_uint32()
        size = struct.calcsize(code)
        self.align(size)
        order = '<' if self.endian == ord('l') else '>'
        return list(struct.unpack_from(f'{order}{length // size}{code}', self.buf, self.read(length)))

    def arguments(self, signature: str) -> list[Any]:
        return [self.read_argument(kind) for kind in parse_signature(signature)]


class _Arguments(_Body):
    """Decoder for the arguments of a method call. Any client may have made them up, so the number of values is limited
    to what can be decoded while all others wait."""

    def __init__(self, data: bytes | bytearray, endian: int, fds: Fds | None = None) -> None:
        super().__init__(data, endian, fds)
        self._left = MAX_VALUES

    def read_argument(self, kind: SignatureType) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f'more than {MAX_VALUES} values')
        return super().read_argument(kind)

    def read_variant(self, _: object = None) -> Any:
        signature = self.read_signature()
        if len(signature) > MAX_VARIANT:        # parsing one takes up to half a millisecond
            raise ValueError(f'a variant of {len(signature)} types')
        [kind] = parse_signature(signature)
        return self.read_argument(kind)


@functools.lru_cache(MAX_SIGNATURES)
def parse_signature(signature: str) -> list[SignatureType]:
    """Parse a signature into its complete types. ValueError for an invalid one."""
    # the library's own cache (SignatureTree._get) keeps everything it ever saw, and variants bring signatures of any
    # client
    return list(SignatureTree(signature).types)


def marshal(message: Message) -> bytes:
    """Marshal a message whose serial is set. ValueError if body and signature disagree, LimitsExceeded for more than
    MAX_SENT bytes."""
    data = bytes(message._marshall(negotiate_unix_fd=True))
    if len(data) > MAX_SENT:
        raise LimitsExceeded(f'the message is too long: {len(data):,} bytes, the limit is {MAX_SENT:,}',
                             hint='ask for less at a time: a subtree, or one image')
    return data


def make_call(destination: str, path: str, interface: str, member: str, signature: str = '', body: Sequence[Any] = (),
              flags: int = 0) -> Message:
    call = Message(destination=destination, path=path, member=member, flags=_Flag(flags), signature=signature,
                   body=list(body), unix_fds=[])
    if interface:       # a call need not name an interface
        call.interface = interface
    return call


def make_return(call: Received, signature: str = '', body: Sequence[Any] = ()) -> Message:
    return Message(message_type=_Type.METHOD_RETURN, reply_serial=call.serial, destination=call.sender,
                   signature=signature, body=list(body), unix_fds=[])


def make_error(call: Received, name: str, signature: str, body: Sequence[Any]) -> Message:
    return Message(message_type=_Type.ERROR, reply_serial=call.serial, destination=call.sender, error_name=name,
                   signature=signature, body=list(body), unix_fds=[])


def ready_error(name: str, signature: str, body: Sequence[Any]) -> ReadyError:
    data = marshal(make_error(Received(MessageType.CALL, 0, 1, ord('l'), 0, sender=':0.0'), name, signature, body))
    fields = _text(4, name)
    _, length, _, _ = _FIXED.unpack_from(data)
    return ReadyError(fields + bytes(-len(fields) % 8) + _signature(signature), data[len(data) - length:])


def _text(number: int, value: str) -> bytes:
    """Marshal a header field that is a string."""
    data = value.encode()
    return _NUMBER.pack(number, 1, ord('s'), 0, len(data)) + data + b'\0'


def _signature(value: str) -> bytes:
    """Marshal the header field 8 with padding."""
    field = bytes([8, 1, ord('g'), 0, len(value)]) + value.encode() + b'\0'
    return field + bytes(-len(field) % 8)


def make_signal(path: str, interface: str, member: str, signature: str, body: Sequence[Any]) -> Message:
    """Make a signal for all listeners."""
    return Message(message_type=_Type.SIGNAL, path=path, interface=interface, member=member, signature=signature,
                   body=list(body), unix_fds=[])


def address(data: bytes, serial: int, destination: str) -> bytes:
    """Address a marshalled message, which has no destination yet, to one receiver and give it this serial. The field
    for the destination is added at the end, since fields have no order."""
    start, length, _, size = _FIXED.unpack_from(data)
    fields = data[_FIXED.size:_FIXED.size + size] + bytes(-size % 8) + _text(6, destination)
    return (_FIXED.pack(start, length, serial, len(fields)) + fields + bytes(-len(fields) % 8)
            + data[len(data) - length:])


def resolve_address(bus: str) -> str:
    """Return the address that 'system' or 'session' stands for. Any other address is returned as it is. OSError if
    there is none."""
    if bus == 'system':
        return str(get_system_bus_address())
    if bus != 'session':
        return bus
    if address := os.environ.get('DBUS_SESSION_BUS_ADDRESS'):
        return address
    runtime = os.environ.get('XDG_RUNTIME_DIR')
    if not runtime:
        raise OSError('no session bus: neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR is set')
    return f'unix:path={runtime}/bus'


def socket_names(address: str) -> list[str]:
    """Return the names of the unix sockets in an address, in its order: paths, or abstract names with their NUL.
    ValueError."""
    return [name for transport, options in parse_address(address)
            if transport == 'unix' and (name := _socket_name(options))]


def _socket_name(options: dict[str, str]) -> str:
    name = options.get('path') or '\0' + options.get('abstract', '')
    return '' if name == '\0' else name


class _Connecting(MessageBus):
    """The library's address, socket and SASL code. None of it runs once the socket is ours."""

    def _setup_socket(self) -> None:
        errors: list[Exception] = []
        for transport, options in self._bus_address:
            name = _socket_name(options)
            if transport != 'unix' or not name:
                errors.append(OSError(f'cannot connect to {transport}:{options}'))
                continue
            # the library leaves the sockets of failed attempts to the garbage collector
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(name)
            except OSError as error:
                sock.close()
                errors.append(error)
                continue
            sock.setblocking(False)
            self._sock, self._fd, self._stream = sock, sock.fileno(), io.BytesIO()   # type: ignore[assignment]
            return
        raise errors[-1]

    async def _auth_readline(self) -> str:
        line = b''
        while not line.endswith(b'\r\n'):
            piece = await self._loop.sock_recv(self._sock, 1)
            # the library's loop never ends at end-of-file and never yields, so the whole process would hang
            if not piece or len(line) > LINE_LIMIT:
                raise ConnectionError('the bus closed the connection during authentication')
            line += piece
        return line[:-2].decode('ascii', 'replace')


async def open_socket(address: str) -> socket.socket:
    """Open a socket and authenticate by SASL, with fd passing agreed. OSError, AuthError, or ValueError (a bad
    address)."""
    bus = _Connecting(address, negotiate_unix_fd=True)
    try:
        await bus._authenticate()
    except BaseException:
        bus._sock.close()
        raise
    return bus._sock
