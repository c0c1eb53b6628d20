# SPDX-License-Identifier: LGPL-2.1-or-later
"""Times and sizes as people write and read them: systemd.time(7) spans, binary prefixes."""

import re
import time

USEC_PER_SEC = 1_000_000

# systemd.time(7), "Parsing time spans"; a number without a unit is seconds
_UNITS = {
    'us': 1, 'usec': 1, 'µs': 1, 'μs': 1,
    'ms': 1_000, 'msec': 1_000,
    's': USEC_PER_SEC, 'sec': USEC_PER_SEC, 'second': USEC_PER_SEC, 'seconds': USEC_PER_SEC, '': USEC_PER_SEC,
    'm': 60 * USEC_PER_SEC, 'min': 60 * USEC_PER_SEC, 'minute': 60 * USEC_PER_SEC, 'minutes': 60 * USEC_PER_SEC,
    'h': 3600 * USEC_PER_SEC, 'hr': 3600 * USEC_PER_SEC, 'hour': 3600 * USEC_PER_SEC, 'hours': 3600 * USEC_PER_SEC,
}
# binary prefixes, as systemd reads sizes: 'K' is 1024
_SIZE = re.compile(r'(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?', re.IGNORECASE | re.ASCII)
_SPAN = re.compile(r'\s*(\d+(?:\.\d+)?)\s*([a-zµμ]*)')


def parse_timespan(text: str) -> int:
    """Parse '10', '10s', '500ms', '2min' or '1min 30s' into microseconds. ValueError for anything else, and for
    zero."""
    at, total = 0, 0.0
    while at < len(text.rstrip()):
        match = _SPAN.match(text, at)
        if match is None or match[2] not in _UNITS:
            raise ValueError(f'{text!r} is not a time span such as "10s", "500ms" or "2min"')
        total += float(match[1]) * _UNITS[match[2]]
        at = match.end()
    if not 1 <= total < 2**63:
        raise ValueError(f'{text!r} is not a time span above zero')
    return round(total)


def parse_size(text: str) -> int:
    """Parse '4096', '64M', '64 MiB' or '1.5G' into bytes. ValueError for anything else, and for zero."""
    match = _SIZE.fullmatch(text.strip())
    total = float(match[1]) * 1024 ** ' KMGT'.index((match[2] or ' ').upper()) if match else 0
    if not 1 <= total < 2**63:
        raise ValueError(f'{text!r} is not a size such as "4096", "64M" or "1GiB"')
    return round(total)


def format_timespan(usec: int) -> str:
    """Format a time with three significant digits up to a minute: '870 us', '3.21 ms', '12.4 s', then '2min 5s'."""
    if usec < 1_000:
        return f'{usec} us'
    if usec < USEC_PER_SEC:
        return f'{_digits(usec / 1_000)} ms'
    if usec < 60 * USEC_PER_SEC:
        return f'{_digits(usec / USEC_PER_SEC)} s'
    minutes, seconds = divmod(round(usec / USEC_PER_SEC), 60)
    return f'{minutes}min {seconds}s' if minutes < 60 else f'{minutes // 60}h {minutes % 60}min'


def format_bytes(count: int) -> str:
    """Format a size: '512 B', '4.00 KiB', '12.3 MiB'."""
    if count < 1024:
        return f'{count} B'
    value = float(count)
    for unit in ('KiB', 'MiB', 'GiB', 'TiB', 'PiB'):
        value /= 1024
        if value < 1024 or unit == 'PiB':
            break
    return f'{_digits(value)} {unit}'


def format_count(number: int, noun: str) -> str:
    """Format a count: '1 task', '2 tasks', '3 processes'."""
    plural = f'{noun}es' if noun.endswith('s') else f'{noun}s'
    return f'{number} {noun if number == 1 else plural}'


def format_time(usec: int) -> str:
    """Format microseconds since 1970 as local time, in the form of systemd.time(7)."""
    return time.strftime('%a %Y-%m-%d %H:%M:%S %Z', time.localtime(usec / USEC_PER_SEC)) if usec else 'n/a'


def _digits(value: float) -> str:
    return f'{value:.2f}' if value < 10 else f'{value:.1f}' if value < 100 else f'{value:.0f}'
