# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plain values to the wire and back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.bus import header, wire
from ckptd.bus.values import split_signature, to_body, to_text, to_variant, to_variants

TEXT = st.text(st.characters(blacklist_characters='\0', blacklist_categories=['Cs']), max_size=20)
BASIC = st.one_of(st.booleans(), st.integers(0, 2**64 - 1), st.integers(-2**63, -1), TEXT, st.binary(max_size=9),
                  st.floats(allow_nan=False))
PLAIN = st.recursive(
    BASIC, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=8)


def through_the_wire(signature: str, values: list[Any]) -> list[Any]:
    call = wire.make_call('a.b', '/', 'a.b', 'C', signature, to_body(signature, values))
    call.serial = 1
    data = wire.marshal(call)
    fields, length = header.lengths(data[:16])
    received = header.parse_header(data[:16], data[16:16 + fields])
    received.raw = data[16 + fields:]
    assert len(received.raw) == length
    return received.body()


@given(st.dictionaries(TEXT, PLAIN, max_size=5))
def test_a_dict_comes_back_as_it_was(row: dict[str, Any]) -> None:
    assert through_the_wire('a{sv}', [row]) == [row]


@pytest.mark.parametrize(('value', 'signature'), [
    (True, 'b'), (1, 't'), (-1, 'x'), (1.5, 'd'), ('s', 's'), (b'', 'ay'), ([], 'as'), ([1, 2], 'at'), ([1, -2], 'av'),
    ([1, 'a'], 'av'), ({}, 'a{sv}'), ([{}], 'aa{sv}'), ((1, 2), 'at'), ([[1], [2]], 'aat')])
def test_guessed_types(value: object, signature: str) -> None:
    assert to_variant(value).signature == signature


def test_a_type_map_reaches_nested_rows() -> None:
    out = to_variants({'pid': 7, 'rows': [{'pid': 8}], 'none': None}, {'pid': 'u', 'rows': 'aa{sv}'})
    assert out['pid'].signature == 'u'
    assert out['rows'].value[0]['pid'].signature == 'u'
    assert 'none' not in out


def test_structures() -> None:
    assert through_the_wire('a(uosss)as', [[(1, '/a', 'b', 'c', 'd')], []]) == [[[1, '/a', 'b', 'c', 'd']], []]
    assert through_the_wire('a{st}a{oa{sv}}', [{'a': 1}, {'/a': {'b': 1}}]) == [{'a': 1}, {'/a': {'b': 1}}]


@pytest.mark.parametrize(('text', 'shown'), [
    ('plain', 'plain'), ('ä', 'ä'), ('x\udcffy', 'x\\udcffy'), ('a\0b', 'a\\x00b')])
def test_what_is_no_utf8_becomes_visible(text: str, shown: str) -> None:
    assert to_text(text) == shown
    assert through_the_wire('sa{sv}', [text, {'path': text}]) == [shown, {'path': shown}]


@pytest.mark.parametrize(('signature', 'value'), [('u', -1), ('o', 'no path'), ('t', 'text'), ('(ss)', ('a',))])
def test_a_wrong_value_is_an_error(signature: str, value: object) -> None:
    with pytest.raises(ValueError):
        through_the_wire(signature, [value])


def test_split_signature() -> None:
    assert split_signature('sa{sv}(uo)aah') == ['s', 'a{sv}', '(uo)', 'aah']
    with pytest.raises(ValueError):
        split_signature('a{s')
