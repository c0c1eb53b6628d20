# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the header of a message field by field. Unknown fields are skipped without decoding, because there may be many
(dbus-broker passes on what any client makes up).

    endian u8:type u8:flags u8:1 u32:body_length u32:serial a(yv):fields pad8
"""

import struct
from functools import lru_cache
from typing import Any, Final

from ckptd.bus.message import ProtocolError
from ckptd.bus.wire import Received

FIXED: Final = 16           # bytes at the start of every message, up to and including the length of the field array
MAX_KNOWN: Final = 512      # bytes of a field array that is cached
MAX_STEPS: Final = 256      # values of unknown fields that are skipped at most

_FIXED = {ord('l'): struct.Struct('<BBBBIII'), ord('B'): struct.Struct('>BBBBIII')}
# number of a header field -> attribute of Received, type. Unknown fields must be ignored (D-Bus specification, "Header
# Fields").
_FIELDS = {1: ('path', b'o'), 2: ('interface', b's'), 3: ('member', b's'), 4: ('error_name', b's'),
           5: ('reply_serial', b'u'), 6: ('destination', b's'), 7: ('sender', b's'), 8: ('signature', b'g'),
           9: ('fd_count', b'u')}
_SIZES = {ord(kind): size for kind, size in
          {'y': 1, 'b': 4, 'n': 2, 'q': 2, 'i': 4, 'u': 4, 'x': 8, 't': 8, 'd': 8, 'h': 4}.items()}
_ALIGNMENTS = _SIZES | {ord(kind): size for kind, size in
                        {'s': 4, 'o': 4, 'g': 1, 'v': 1, 'a': 4, '(': 8, '{': 8}.items()}


def lengths(fixed: bytes) -> tuple[int, int]:
    """Return (bytes of the padded field array, bytes of the body) from the first 16 bytes. ProtocolError."""
    values = read_fixed(fixed)
    return (values[6] + 7) & ~7, values[4]


def read_fixed(fixed: bytes) -> tuple[int, ...]:
    """Return (endian, type, flags, 1, bytes of the body, serial, bytes of the field array). ProtocolError."""
    layout = _FIXED.get(fixed[0])
    if layout is None or fixed[3] != 1:
        raise ProtocolError(f'not a D-Bus message: {fixed!r}')
    return layout.unpack(fixed)


def parse_header(fixed: bytes, rest: bytes) -> Received:
    """Parse a message without its body from the first 16 bytes and the field array (padded or not). ProtocolError."""
    return parse_fields(read_fixed(fixed), rest)


def parse_fields(fixed: tuple[int, ...], rest: bytes) -> Received:
    """Parse a message without its body from the result of `read_fixed` and the field array."""
    endian, kind, flags, _, length, serial, size = fixed
    read = _read_fields if size > MAX_KNOWN else _known_fields
    try:
        return Received(kind, flags, serial, endian, length, *read(rest[:size], '<' if endian == ord('l') else '>'))
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise ProtocolError(f'malformed header: {error}') from error


def _read_fields(data: bytes, order: str) -> tuple[Any, ...]:
    """Return the values of _FIELDS in a field array. The array begins at a multiple of 8 in its message."""
    found = _Fields(data, order).read()
    return tuple(found.get(name, 0 if kind == b'u' else '') for name, kind in _FIELDS.values())


# A busy sender repeats its field array. Finding it here takes a tenth of the time of parsing it again.
_known_fields = lru_cache(1024)(_read_fields)


class _Fields:
    """Parser of a field array. Values are aligned by their offset in it."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._end, self._steps = data, len(data), 0
        self._number = struct.Struct(f'{order}I')

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        at = 0
        while at < self._end:
            at = (at + 7) & ~7      # a structure is aligned to 8
            code = self._data[at]
            at, kind = self._signature(at + 1)
            name, wanted = _FIELDS.get(code, ('', b''))
            if kind != wanted:
                at, _ = self._step_over(at, kind, 0)
            elif wanted == b'u':
                at, found[name] = self._u32(at)
            else:
                at, text = self._signature(at) if wanted == b'g' else self._string(at)
                found[name] = text.decode()
            if at > self._end:
                raise ValueError('a field is longer than the field array')
        return found

    def _u32(self, at: int) -> tuple[int, int]:
        at = (at + 3) & ~3
        return at + 4, self._number.unpack_from(self._data, at)[0]

    def _string(self, at: int) -> tuple[int, bytes]:
        at, length = self._u32(at)
        return at + length + 1, self._data[at:at + length]

    def _signature(self, at: int) -> tuple[int, bytes]:
        end = at + 1 + self._data[at]
        return end + 1, self._data[at + 1:end]

    def _step_over(self, at: int, kinds: bytes, place: int) -> tuple[int, int]:
        """Return the offsets behind a value and behind its type in the signature."""
        self._steps += 1
        if self._steps > MAX_STEPS or at > self._end:
            raise ValueError('too many values in unknown fields')
        kind = kinds[place]
        if kind in _SIZES:
            return _align(at, kind) + _SIZES[kind], place + 1
        if kind in b'so':
            return self._string(at)[0], place + 1
        if kind == ord('g'):
            return self._signature(at)[0], place + 1
        if kind == ord('v'):
            at, inner = self._signature(at)
            return self._step_over(at, inner, 0)[0], place + 1
        if kind == ord('a'):
            at, length = self._u32(at)
            return _align(at, kinds[place + 1]) + length, _behind_type(kinds, place + 1)
        at, place = _align(at, kind), place + 1     # a structure
        while kinds[place] not in b')}':
            at, place = self._step_over(at, kinds, place)
        return at, place + 1


def _align(at: int, kind: int) -> int:
    size = _ALIGNMENTS[kind]
    return (at + size - 1) & -size


def _behind_type(kinds: bytes, place: int) -> int:
    depth = 0
    while True:
        depth += (kinds[place] in b'({') - (kinds[place] in b')}')
        place += 1
        if not depth and kinds[place - 1] != ord('a'):
            return place
