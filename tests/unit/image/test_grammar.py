# SPDX-License-Identifier: LGPL-2.1-or-later
"""The grammar: every record comes back as it was, every damage is found, no length makes a reader allocate."""

import io
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import ImageDamaged
from ckptd.image import records as r
from ckptd.image.grammar import (
    MAX_RECORD,
    OPTIONAL,
    RECORDS,
    U8,
    U32,
    Record,
    decode_records,
    encode_end,
    encode_header,
    encode_record,
    layout,
    read_records,
    record,
)
from tests.unit.image.samples import values

PART = b'TREE'
CLASSES = [cls for tag, cls in sorted(RECORDS.items()) if tag < 0x1000]


@record(0x7001, version=2)
class Grown(Record):
    """A record that got two fields in its second version."""
    old: U8
    new: U32 = 5
    text: str = 'none'


@record(0x7002, optional=True)
class Spare(Record):
    value: U8


def encoded(*records: Record) -> bytes:
    return encode_header(PART) + b''.join(encode_record(one) for one in records) + encode_end(len(records))


def framed(tag: int, payload: bytes, *, version: int = 1, flags: int = 0, length: int | None = None) -> bytes:
    """A record as bytes, with a sound checksum whatever it says."""
    head = struct.pack('<HBBI', tag, version, flags, len(payload) if length is None else length)
    return head + struct.pack('<I', zlib.crc32(head + payload)) + payload


def decoded(*frames: bytes) -> list[Record]:
    return list(decode_records(encode_header(PART) + b''.join(frames) + encode_end(len(frames)), PART, 'x.img'))


@pytest.mark.parametrize('cls', CLASSES, ids=lambda cls: cls.__name__)
def test_every_record_comes_back(cls: type[Record]) -> None:
    @settings(max_examples=15, deadline=None)
    @given(st.lists(values(cls), max_size=3))
    def check(records: list[Record]) -> None:
        assert list(decode_records(encoded(*records), PART, 'x.img')) == records
    check()


def test_tags_say_the_part() -> None:
    assert {tag >> 8 for tag in RECORDS if tag < 0x1000} == set(range(len(r.PARTS)))


def test_records_have_no_dict() -> None:
    assert not hasattr(r.Limit(1, 2), '__dict__')


def test_an_older_payload_gets_the_defaults() -> None:
    assert decoded(framed(0x7001, b'\x01', version=1)) == [Grown(1)]


def test_a_newer_payload_may_go_on() -> None:
    payload = Grown(1, 2, 'x').encode() + b'more'
    assert decoded(framed(0x7001, payload, version=3)) == [Grown(1, 2, 'x')]
    with pytest.raises(ImageDamaged, match='4 bytes follow its last field'):
        decoded(framed(0x7001, payload, version=2))


def test_a_payload_of_this_version_is_whole() -> None:
    with pytest.raises(ImageDamaged, match=r'x\.img: record 0x7001 at byte 16 \(Grown\)'):
        decoded(framed(0x7001, b'\x01', version=2))


def test_an_unknown_optional_record_is_skipped() -> None:
    assert decoded(framed(0x7003, b'what', flags=OPTIONAL), encode_record(Spare(3))) == [Spare(3)]
    with pytest.raises(ImageDamaged, match='unknown to this ckptd'):
        decoded(framed(0x7003, b'what'))


def test_a_newer_format_is_named() -> None:
    data = struct.pack('<8sHH4s', b'CKPTDIMG', 2, 0, PART)
    with pytest.raises(ImageDamaged, match='format 2 is newer') as caught:
        list(decode_records(data, PART, 'x.img'))
    assert 'newer one' in caught.value.hint


def test_another_part_is_no_tree() -> None:
    with pytest.raises(ImageDamaged, match='not a TREE part'):
        list(decode_records(encode_header(b'MEM ') + encode_end(0), PART, 'x.img'))


def test_every_prefix_is_damage() -> None:
    data = encoded(r.Limits(1, (r.Limit(1, 2),)), r.Fs(1, '/', '/', 0o22))
    for end in range(len(data)):
        with pytest.raises(ImageDamaged):
            list(decode_records(data[:end], PART, 'x.img'))
    with pytest.raises(ImageDamaged):
        list(decode_records(data + b'\0', PART, 'x.img'))


def test_every_flipped_bit_is_damage() -> None:
    data = encoded(r.Limits(1, (r.Limit(1, 2),)), Spare(1), r.Fs(1, '/', '/', 0o22))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ImageDamaged):
            list(decode_records(flipped, PART, 'x.img'))


def test_a_value_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r'Limit\.soft/hard'):
        encode_record(r.Limits(1, (r.Limit(-1, 0),)))
    with pytest.raises(ValueError, match='at most'):
        encode_record(r.SavedFile(1, 'x', 0, 0, 0, 0, 0, 0, '', bytes(MAX_RECORD)))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CLASSES), st.binary(max_size=64))
def test_any_payload_decodes_or_is_damage(cls: type[Record], payload: bytes) -> None:
    try:
        found = decoded(framed(cls.tag, payload))
    except ImageDamaged:
        return
    assert [type(one) for one in found] == [cls]


@pytest.mark.parametrize('payload', [
    struct.pack('<II', 1, 0xFFFFFFFF),                      # a list of integers
    struct.pack('<III', 1, 0xFFFFFFFF, 7) + bytes(100),     # of structs
], ids=['empty', 'short'])
@pytest.mark.parametrize('cls', [r.Limits, r.IntervalTimers, r.FdTable, r.TaskIds, r.Backing, r.Registers])
def test_a_hostile_count_allocates_nothing(cls: type[Record], payload: bytes) -> None:
    data = encode_header(PART) + framed(cls.tag, payload) + encode_end(1)
    assert peak_of(data) < 200_000


@pytest.mark.parametrize('length', [MAX_RECORD, MAX_RECORD + 1, 0xFFFFFFFF])
def test_a_hostile_length_allocates_nothing(length: int) -> None:
    assert peak_of(encode_header(PART) + framed(0x0111, b'x', length=length)) < 200_000


def peak_of(data: bytes) -> int:
    """Bytes allocated at most while damaged data is found to be so."""
    tracemalloc.start()
    try:
        with pytest.raises(ImageDamaged):
            list(read_records(io.BytesIO(data), PART, 'x.img'))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_field_without_encoding_is_refused() -> None:
    with pytest.raises(TypeError, match='no encoding'):
        @layout
        class Wrong(Record):
            value: float


def test_a_tag_is_taken_once() -> None:
    with pytest.raises(TypeError, match='taken'):
        record(0x7001)(type('Again', (Record,), {'__annotations__': {}}))
