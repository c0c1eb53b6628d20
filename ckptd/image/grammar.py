# SPDX-License-Identifier: LGPL-2.1-or-later
"""The grammar of an image's record files: typed, length-prefixed, checksummed records of unsigned fields.

All integers are little-endian.

    file    = header record* end
    header  = "CKPTDIMG" u16:format u16:0 u32:part          part: a four-letter code, b'TREE', b'MEM ' ...
    record  = u16:tag u8:version u8:flags u32:length u32:crc payload[length]
    end     = a record with tag 0xffff, payload u64: records before it
    payload = field*                                        in the order of the class that owns the tag
    field   = u8 | u16 | u32 | u64
            | bytes: u32:length byte[length]      | str: the same, UTF-8 (surrogateescape: paths are bytes)
            | list:  u32:count field[count]       | struct: its fields in a row

crc is zlib.crc32 over the record's first eight bytes and its payload. flags: 1 = optional: a reader skips the record if
the tag is unknown. An unknown tag without this flag is an error. A newer version of a record only adds fields with
defaults at its end. An older payload gets the defaults; a reader ignores unknown fields at the end of a newer one. The
fields of a struct never change, because nothing marks the begin of the next struct in a list.
"""

import dataclasses
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import starmap
from typing import (
    Annotated,
    Any,
    BinaryIO,
    ClassVar,
    TypeVar,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from ckptd.errors import ImageDamaged

FORMAT = 1
MAGIC = b'CKPTDIMG'
END = 0xFFFF
OPTIONAL = 1
MAX_RECORD = 16 << 20       # bounds the allocation for a hostile length; long lists go into several records

_HEADER = struct.Struct('<8sHHI')
_RECORD = struct.Struct('<HBBII')
_HEAD = struct.Struct('<HBBI')      # the part that the checksum covers
_CRC = struct.Struct('<I')
_LENGTH = struct.Struct('<I')

U8 = Annotated[int, 'B']
U16 = Annotated[int, 'H']
U32 = Annotated[int, 'I']
U64 = Annotated[int, 'Q']

T = TypeVar('T')
Encoder = Callable[[Any, bytearray], None]
Decoder = Callable[[memoryview, int], tuple[Any, int]]
RECORDS: dict[int, type['Record']] = {}


class Struct:
    """A group of fields without a tag. Its layout never changes. Subclasses are made by @layout."""
    __slots__ = ()
    _codec: ClassVar['Codec']

    def encode(self) -> bytes:
        """Return the payload: this object's fields in a row."""
        out = bytearray()
        self._codec.encode(self, out)
        return bytes(out)

    @classmethod
    def decode(cls: type[T], payload: bytes | memoryview) -> T:
        """Rebuild the object. ImageDamaged if the bytes do not fit. Bytes after the last known field are ignored."""
        codec = cast(Codec, cls._codec)  # type: ignore[attr-defined]
        return cast(T, codec.decode(memoryview(payload), 0, partial=True)[0])


class Record(Struct):
    """A tagged group of fields. A record file is a sequence of records."""
    __slots__ = ()
    tag: ClassVar[int]
    version: ClassVar[int]
    optional: ClassVar[bool]


@dataclass_transform(frozen_default=True)
def layout(cls: type[T]) -> type[T]:
    """Make a frozen dataclass with slots, and a codec from its annotations."""
    made = dataclasses.dataclass(frozen=True, slots=True)(cls)
    made._codec = Codec(made)  # type: ignore[attr-defined]
    return made


@dataclass_transform(frozen_default=True)
def record(tag: int, *, version: int = 1, optional: bool = False) -> Callable[[type[T]], type[T]]:
    """Apply @layout and set the tag. A tag is never reused."""
    def decorate(cls: type[T]) -> type[T]:
        made = cast(Any, layout(cls))
        made.tag, made.version, made.optional = tag, version, optional
        if tag in RECORDS or tag == END:
            raise TypeError(f'record tag {tag:#x} is taken')
        RECORDS[tag] = made
        return cast(type[T], made)
    return decorate


class Codec:
    """Encoder and decoder of one class. Runs of integers are packed at once, all else field by field."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.fields = dataclasses.fields(cls)
        self.hints = hints = get_type_hints(cls, include_extras=True)
        self.steps: list[tuple[tuple[str, ...], struct.Struct | None, Encoder | None, Decoder | None]] = []
        run: list[tuple[str, str]] = []
        for field in self.fields:
            code = _int_code(hints[field.name])
            # a field with a default may be missing at the end of an older payload, so it ends the run
            if code is not None and field.default is dataclasses.MISSING:
                run.append((field.name, code))
                continue
            self._flush(run)
            if code is not None:
                self._flush([(field.name, code)])
            else:
                self.steps.append(((field.name,), None, *_field_codec(hints[field.name])))
        self._flush(run)
        self.packer = self.steps[0][1] if len(self.steps) == 1 else None        # if all fields are integers

    def _flush(self, run: list[tuple[str, str]]) -> None:
        if run:
            packer = struct.Struct('<' + ''.join(code for _, code in run))
            self.steps.append((tuple(name for name, _ in run), packer, None, None))
            run.clear()

    def encode(self, value: Any, out: bytearray) -> None:
        try:
            for names, packer, encoder, _ in self.steps:
                if packer is not None:
                    out += packer.pack(*[getattr(value, name) for name in names])
                elif encoder is not None:
                    encoder(getattr(value, names[0]), out)
        except struct.error as error:
            raise ValueError(f'{self.cls.__name__}.{"/".join(names)}: {error}') from error

    def decode(self, data: memoryview, at: int, *, partial: bool = False) -> tuple[Any, int]:
        values: list[Any] = []
        for _, packer, _, decoder in self.steps:
            if partial and at == len(data):
                break
            if packer is not None:
                values += _unpack(packer, data, at)
                at += packer.size
            elif decoder is not None:
                value, at = decoder(data, at)
                values.append(value)
        try:
            return self.cls(*values), at
        except TypeError as error:
            raise ImageDamaged(f'record {self.cls.__name__} ends before its last field') from error


def _unpack(packer: struct.Struct, data: memoryview, at: int) -> tuple[Any, ...]:
    if at + packer.size > len(data):
        raise ImageDamaged(f'record cut short at byte {at} of {len(data)}')
    return packer.unpack_from(data, at)


def _int_code(annotation: Any) -> str | None:
    return get_args(annotation)[1] if get_origin(annotation) is Annotated else None


def _field_codec(annotation: Any) -> tuple[Encoder, Decoder]:
    code = _int_code(annotation)
    if code is not None:
        packer = struct.Struct('<' + code)

        def encode_int(value: Any, out: bytearray) -> None:
            out += packer.pack(value)

        return encode_int, lambda data, at: (_unpack(packer, data, at)[0], at + packer.size)
    if annotation is bytes:
        return _encode_bytes, _decode_bytes
    if annotation is str:
        return _encode_str, _decode_str
    if get_origin(annotation) is tuple:
        return _list_codec(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        return annotation._codec.encode, annotation._codec.decode
    raise TypeError(f'no encoding for {annotation!r}')


def _encode_bytes(value: Any, out: bytearray) -> None:
    out += _LENGTH.pack(len(value))
    out += value


def _decode_bytes(data: memoryview, at: int) -> tuple[bytes, int]:
    length, start = _unpack(_LENGTH, data, at)[0], at + 4
    if length > len(data) - start:
        raise ImageDamaged(f'field of {length} bytes at byte {at} of a record of {len(data)}')
    return bytes(data[start:start + length]), start + length


def _encode_str(value: Any, out: bytearray) -> None:
    _encode_bytes(value.encode('utf-8', 'surrogateescape'), out)


def _decode_str(data: memoryview, at: int) -> tuple[str, int]:
    value, at = _decode_bytes(data, at)
    return value.decode('utf-8', 'surrogateescape'), at


def _list_codec(item: Any) -> tuple[Encoder, Decoder]:
    code = _int_code(item)
    if code is not None:
        return _int_list_codec(code)
    encode_item, decode_item = _field_codec(item)
    packer = item._codec.packer if isinstance(item, type) and issubclass(item, Struct) else None
    least = packer.size if packer else 1        # every item has at least one byte

    def encode_list(value: Any, out: bytearray) -> None:
        out += _LENGTH.pack(len(value))
        for one in value:
            encode_item(one, out)

    def decode_list(data: memoryview, at: int) -> tuple[tuple[Any, ...], int]:
        count, at = _unpack(_LENGTH, data, at)[0], at + 4
        if count * least > len(data) - at:
            raise ImageDamaged(f'list of {count} items in {len(data) - at} bytes')
        if packer:
            return tuple(starmap(item, packer.iter_unpack(data[at:at + count * least]))), at + count * least
        items = []
        for _ in range(count):
            one, at = decode_item(data, at)
            items.append(one)
        return tuple(items), at

    return encode_list, decode_list


def _int_list_codec(code: str) -> tuple[Encoder, Decoder]:
    size = struct.calcsize('<' + code)

    def encode_ints(value: Any, out: bytearray) -> None:
        out += struct.pack(f'<I{len(value)}{code}', len(value), *value)

    def decode_ints(data: memoryview, at: int) -> tuple[tuple[int, ...], int]:
        count, at = _unpack(_LENGTH, data, at)[0], at + 4
        if count > (len(data) - at) // size:
            raise ImageDamaged(f'list of {count} integers in {len(data) - at} bytes')
        return struct.unpack_from(f'<{count}{code}', data, at), at + count * size

    return encode_ints, decode_ints


def encode_header(part: bytes) -> bytes:
    """Return the first bytes of a record file. part is its four-letter code."""
    return _HEADER.pack(MAGIC, FORMAT, 0, int.from_bytes(part.ljust(4), 'little'))


def encode_record(value: Record) -> bytes:
    """Encode one record: header, checksum, payload. ValueError if a value does not fit its field."""
    payload = value.encode()
    if len(payload) > MAX_RECORD:
        raise ValueError(f'{type(value).__name__} of {len(payload)} bytes: a record has at most {MAX_RECORD}')
    return _frame(value.tag, value.version, OPTIONAL if value.optional else 0, payload)


def encode_end(records: int) -> bytes:
    """Return the last bytes of a record file of so many records."""
    return _frame(END, 1, 0, struct.pack('<Q', records))


def _frame(tag: int, version: int, flags: int, payload: bytes) -> bytes:
    head = _HEAD.pack(tag, version, flags, len(payload))
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def decode_records(data: bytes | memoryview, part: bytes, name: str) -> Iterator[Record]:
    """Yield the records of one file that is in memory; see `read_records`."""
    return read_records(io.BytesIO(data), part, name)


def read_records(file: BinaryIO, part: bytes, name: str) -> Iterator[Record]:
    """Yield the records of one file, one in memory at a time. name is for messages.

    ImageDamaged at the first wrong byte, before anything is allocated for it.
    """
    _read_header(file, part, name)
    at, count = _HEADER.size, 0
    while True:
        tag, version, flags, payload = _read_frame(file, at, name)
        if tag == END:
            break
        value = _decode_payload(tag, version, flags, payload, f'{name}: record {tag:#x} at byte {at}')
        at, count = at + _RECORD.size + len(payload), count + 1
        if value is not None:
            yield value
    if len(payload) != 8 or int.from_bytes(payload, 'little') != count or file.read(1):
        raise ImageDamaged(f'{name}: records are missing or bytes follow the end', resource=name)


def _read_header(file: BinaryIO, part: bytes, name: str) -> None:
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise ImageDamaged(f'{name}: cut short in its header', resource=name)
    magic, form, reserved, kind = _HEADER.unpack(head)
    if magic != MAGIC or reserved or not form or kind != int.from_bytes(part.ljust(4), 'little'):
        raise ImageDamaged(f'{name}: not a {part.decode()} part of a ckptd image', resource=name)
    if form > FORMAT:
        raise ImageDamaged(f'{name}: format {form} is newer than this ckptd ({FORMAT})', resource=name,
                           hint='use the ckptd that wrote the image, or a newer one')


def _read_frame(file: BinaryIO, at: int, name: str) -> tuple[int, int, int, bytes]:
    """Return tag, version, flags and payload of the record at byte `at`."""
    head = file.read(_RECORD.size)
    if len(head) < _RECORD.size:
        raise ImageDamaged(f'{name}: cut short at byte {at}', resource=name)
    tag, version, flags, length, crc = _RECORD.unpack(head)
    if length > MAX_RECORD:
        raise ImageDamaged(f'{name}: record {tag:#x} at byte {at} claims {length} bytes', resource=name)
    payload = file.read(length)
    if len(payload) < length:
        raise ImageDamaged(f'{name}: record {tag:#x} at byte {at} is cut short', resource=name)
    if zlib.crc32(payload, zlib.crc32(head[:_HEAD.size])) != crc:
        raise ImageDamaged(f'{name}: record {tag:#x} at byte {at} has a wrong checksum', resource=name)
    return tag, version, flags, payload


def _decode_payload(tag: int, version: int, flags: int, payload: bytes, where: str) -> Record | None:
    """Decode a record. None for an unknown optional one."""
    cls = RECORDS.get(tag)
    if cls is None:
        if flags & OPTIONAL:
            return None
        raise ImageDamaged(f'{where} is unknown to this ckptd', resource=where.partition(':')[0])
    try:
        value, end = cls._codec.decode(memoryview(payload), 0, partial=version < cls.version)
        if end != len(payload) and version <= cls.version:
            raise ImageDamaged(f'{len(payload) - end} bytes follow its last field')
    except ImageDamaged as error:
        raise ImageDamaged(f'{where} ({cls.__name__}): {error}', resource=where.partition(':')[0]) from error
    return cast(Record, value)
