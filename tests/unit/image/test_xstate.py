# SPDX-License-Identifier: LGPL-2.1-or-later
"""XSAVE areas with the gap closed are spread to where debuggers look; all others stay as they are."""

import struct

import pytest

from ckptd.image.cores.xstate import for_debuggers

AVX512 = 0xE7
PKRU = 0x200
AMX = 0x60000


def area(xcr0: int, size: int, components: dict[int, bytes]) -> bytes:
    """An XSAVE area with these bytes at these offsets."""
    made = bytearray(b'\x11' * 832 + bytes(size - 832))
    struct.pack_into('<Q', made, 464, xcr0)
    for offset, content in components.items():
        made[offset:offset + len(content)] = content
    return bytes(made)


K, HALVES, UPPER, KEYS = b'k' * 64, b'h' * 512, b'u' * 1024, b'p' * 8


@pytest.mark.parametrize(('closed', 'spread'), [
    (area(AVX512, 2432, {832: K, 896: HALVES, 1408: UPPER}), area(AVX512, 2688, {1088: K, 1152: HALVES, 1664: UPPER})),
    (area(AVX512 | PKRU, 2440, {832: K, 896: HALVES, 1408: UPPER, 2432: KEYS}),
     area(AVX512 | PKRU, 2696, {1088: K, 1152: HALVES, 1664: UPPER, 2688: KEYS})),
    (area(7 | PKRU, 840, {832: KEYS}), area(7 | PKRU, 2696, {2688: KEYS})),
])
def test_a_closed_gap_is_opened(closed: bytes, spread: bytes) -> None:
    assert for_debuggers(closed) == spread
    assert for_debuggers(spread) == spread


def test_tiles_are_left_out() -> None:
    with_tiles = area(AVX512 | PKRU | AMX, 11008, {512: b'\xe7\x02\x06', 1088: K, 2688: KEYS, 2752: b't' * 8256})
    assert for_debuggers(with_tiles) == area(AVX512 | PKRU, 2696, {512: b'\xe7\x02\0', 1088: K, 2688: KEYS})
    assert for_debuggers(area(7 | AMX, 11008, {})) == area(7, 832, {})


@pytest.mark.parametrize('kept', [
    b'', bytes(512), area(7, 832, {}), area(AVX512, 2688, {}), area(AVX512 | PKRU, 2432, {}),
    area(((1 << 64) - 1) & ~AMX, 2440, {})])
def test_what_is_kept(kept: bytes) -> None:
    assert for_debuggers(kept) == kept
