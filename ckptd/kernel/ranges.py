# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sets of addresses: ascending ranges (start, end) that do not overlap."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ckptd.kernel.memory import Range


class Overlap(NamedTuple):
    """The overlap of two ranges: indices of both, and the range itself."""
    first: int
    second: int
    start: int
    end: int


def overlaps(first: Sequence[Range], second: Sequence[Range]) -> Iterator[Overlap]:
    """Yield the overlaps of all ranges of two sets in ascending order."""
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            yield Overlap(i, j, start, end)
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1


def without(ranges: Iterable[Range], taken: Sequence[Range]) -> Iterator[Range]:
    """Yield the ranges of a set that remain when another set is removed."""
    index = 0
    for start, end in ranges:
        while index < len(taken) and taken[index][1] <= start:
            index += 1
        at = index
        while at < len(taken) and taken[at][0] < end:
            if start < taken[at][0]:
                yield start, taken[at][0]
            start = taken[at][1]
            at += 1
        if start < end:
            yield start, end
