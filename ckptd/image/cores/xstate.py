# SPDX-License-Identifier: LGPL-2.1-or-later
"""The XSAVE area of a core in the form that debuggers expect. Pure.

The standard format puts each component where CPUID leaf 0xD of that processor says, and an image has the area as the
processor had it. Intel's processors keep the place of MPX (960 to 1088) and more before AVX-512 and PKRU; AMD's, which
never had MPX, close the gap. gdb before version 14 knows Intel's places only, and later ones guess from the size alone
(gdb/i387-tdep.c, i387_guess_xsave_layout): any other area is "too small" to them and the vector registers are lost.

AMX tiles come behind PKRU, from 2752 on. No gdb knows them: it computes the size of the area from the components that
it does know, and warns about any other. So a core has the area without the tiles. The image keeps them.
"""

import struct
from typing import NamedTuple

HEADER_END = 576        # legacy area, then the XSAVE header; AVX comes next in every layout
_XCR0 = struct.Struct('<Q')
_XCR0_AT = 464          # NT_X86_XSTATE has the mask of its components here (<asm/user.h>)
_XSTATE_BV_AT = 512     # the mask of components that are not in their initial state


class _Component(NamedTuple):
    """A component of the XSAVE area."""
    bit: int    # in XCR0
    size: int
    offset: int
    closed: dict[int, int]    # its offset with the gap closed, by the size of the whole area


_AVX_END = 832
_COMPONENTS = (
    _Component(5, 64, 1088, {2432: 832, 2440: 832}),        # opmask
    _Component(6, 512, 1152, {2432: 896, 2440: 896}),       # upper halves of ZMM0 to ZMM15
    _Component(7, 1024, 1664, {2432: 1408, 2440: 1408}),    # ZMM16 to ZMM31
    _Component(9, 8, 2688, {2440: 2432, 840: 832}),         # PKRU
)
_AMX = 1 << 17 | 1 << 18        # TILECFG and TILEDATA, of Intel's processors only
_KNOWN = 0b111 | sum(1 << one.bit for one in _COMPONENTS)   # x87, SSE, AVX and these


def for_debuggers(xstate: bytes) -> bytes:
    """Return the area with Intel's offsets. An area that has them already, or of an unknown type, is returned
    unchanged."""
    if len(xstate) < HEADER_END:
        return xstate
    [xcr0] = _XCR0.unpack_from(xstate, _XCR0_AT)
    if xcr0 & _AMX:
        return _without_tiles(xstate, xcr0 & ~_AMX)
    present = [one for one in _COMPONENTS if xcr0 >> one.bit & 1]
    if not present or xcr0 & ~_KNOWN or not all(len(xstate) in one.closed for one in present):
        return xstate
    spread = bytearray(present[-1].offset + present[-1].size)
    spread[:_AVX_END] = xstate[:_AVX_END]
    for one in present:
        at = one.closed[len(xstate)]
        spread[one.offset:one.offset + one.size] = xstate[at:at + one.size]
    return bytes(spread)


def _without_tiles(xstate: bytes, xcr0: int) -> bytes:
    """Return the area up to the end of the last component of `xcr0`, in Intel's layout."""
    present = [one for one in _COMPONENTS if xcr0 >> one.bit & 1]
    cut = bytearray(xstate[:present[-1].offset + present[-1].size if present else _AVX_END])
    _XCR0.pack_into(cut, _XCR0_AT, xcr0)
    [in_use] = _XCR0.unpack_from(cut, _XSTATE_BV_AT)
    _XCR0.pack_into(cut, _XSTATE_BV_AT, in_use & ~_AMX)
    return bytes(cut)
