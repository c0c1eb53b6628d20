# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V objects that belong to an image by name: `checkpoint --sysv=ID,...`. Pure.

    ID          the set of semaphores or the message queue with this id (ipcs(1)), if only one of them exists
    sem:ID      the set of semaphores
    msg:ID      the message queue
"""

from typing import Final, NamedTuple

from ckptd.errors import InvalidArgument

TYPES: Final = ('sem', 'msg')
MAX_NAMES: Final = 64
_DIGITS = 10            # of the highest id, INT_MAX


class SysvName(NamedTuple):
    """The name of an object. str() gives the text that `parse_name` takes."""
    type: str       # of TYPES, or '' for either
    id: int

    def __str__(self) -> str:
        return f'{self.type}:{self.id}' if self.type else str(self.id)


def parse_name(text: str) -> SysvName:
    """Parse ID, sem:ID or msg:ID. InvalidArgument."""
    kind, colon, number = text.rpartition(':')
    is_number = number.isascii() and number.isdigit() and len(number) <= _DIGITS and int(number) < 1 << 31
    if not is_number or (colon and kind not in TYPES):
        raise InvalidArgument(f'{text[:40]!r} is no System V object', resource='sysv',
                              hint='it is an id, sem:ID or msg:ID; "ipcs -s -q" shows them')
    return SysvName(kind, int(number))


def is_name(text: object) -> bool:
    """Whether `parse_name` takes this value."""
    try:
        return isinstance(text, str) and bool(parse_name(text))
    except InvalidArgument:
        return False
