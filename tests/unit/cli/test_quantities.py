# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time spans and sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.cli.quantities import format_bytes, format_count, format_time, format_timespan, parse_size, parse_timespan


@pytest.mark.parametrize(('text', 'usec'), [
    ('10', 10_000_000), ('10s', 10_000_000), ('500ms', 500_000), ('2min', 120_000_000), ('1.5s', 1_500_000),
    ('1min 30s', 90_000_000), ('1h30m', 5_400_000_000), ('250 us', 250), ('7µs', 7), ('2 seconds', 2_000_000)])
def test_time_spans_of_systemd_are_understood(text: str, usec: int) -> None:
    assert parse_timespan(text) == usec


@pytest.mark.parametrize('text', ['', 's', '-1s', '10x', '0', '0s', '1s nonsense', '1e3', 'infinity', '9' * 30])
def test_what_is_no_time_span_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match='is not a time span'):
        parse_timespan(text)


@given(st.integers(1, 10**12))
def test_any_number_of_microseconds_is_read_back(usec: int) -> None:
    assert parse_timespan(f'{usec}us') == usec


@pytest.mark.parametrize(('usec', 'text'), [
    (0, '0 us'), (870, '870 us'), (3_214, '3.21 ms'), (12_345, '12.3 ms'), (999_000, '999 ms'), (1_000_000, '1.00 s'),
    (125_000_000, '2min 5s'), (3_720_000_000, '1h 2min')])
def test_time_spans_are_shown_with_three_digits(usec: int, text: str) -> None:
    assert format_timespan(usec) == text


@pytest.mark.parametrize(('count', 'text'), [
    (0, '0 B'), (1023, '1023 B'), (1024, '1.00 KiB'), (4 << 20, '4.00 MiB'), (1 << 40, '1.00 TiB'),
    (1 << 62, '4096 PiB')])
def test_sizes_have_binary_prefixes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(('text', 'size'), [
    ('4096', 4096), ('1', 1), ('64M', 64 << 20), ('64 MiB', 64 << 20), ('1.5g', 3 << 29), ('2KB', 2048), ('9B', 9),
    ('4T', 4 << 40)])
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize('text', ['', 'M', '0', '-1', '1e3', '12 parsecs', '1i', '9999999T', 'infinity'])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match='is not a size'):
        parse_size(text)


def test_counts_have_their_plural() -> None:
    assert [format_count(n, 'task') for n in (0, 1, 2)] == ['0 tasks', '1 task', '2 tasks']


def test_a_time_that_is_unknown_is_not_1970() -> None:
    assert format_time(0) == 'n/a'
