# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random values of D-Bus types, marshalled: what a library would encode, with extremes, and what none would."""

import random
import struct
from collections.abc import Callable, Mapping, Sequence

_INTEGERS = {'y': 'B', 'b': 'I', 'n': 'h', 'q': 'H', 'i': 'i', 'u': 'I', 'h': 'I', 'x': 'q', 't': 'Q'}
_ALIGNMENT = {'y': 1, 'g': 1, 'v': 1, 'n': 2, 'q': 2, 'x': 8, 't': 8, 'd': 8, '(': 8, '{': 8}
_EXTREMES = (0, 1, 2, 3, -1, 127, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
PATHS = ('/', '/org/ckptd1', '/org/ckptd1/job/1', '/x' * 200)
Options = Mapping[str, Callable[[], tuple[str, object]]]
SIGNATURES = ('s', 'u', 'as', 'a{sv}', '(su)', 'aas', 'a(ss)', 'v', 'ay', 'x', 'b', 'h', 'o', 'g', 'd', 'a{us}')


def split(signature: str) -> list[str]:
    """The complete types of a signature."""
    found = []
    while signature:
        end = _end(signature)
        found.append(signature[:end])
        signature = signature[end:]
    return found


def _end(signature: str) -> int:
    if signature[0] == 'a':
        return 1 + _end(signature[1:])
    if signature[0] not in '({':
        return 1
    depth = 0
    for at, letter in enumerate(signature):
        depth += (letter in '({') - (letter in ')}')
        if not depth:
            return at + 1
    return len(signature)


class Marshal:
    """A body that grows. texts: strings that mean something; options: those of methods, with types that they have."""

    def __init__(self, dice: random.Random, texts: Sequence[str], options: Options) -> None:
        self.data = bytearray()
        self._dice, self._texts, self._options = dice, texts, options

    def add(self, kind: str, value: object = None) -> None:
        """A value of a complete type, by chance where none is given."""
        dice, first = self._dice, kind[0]
        self._align(_ALIGNMENT.get(first, 4))
        if first in _INTEGERS:
            code = _INTEGERS[first]
            number = value if isinstance(value, int) else dice.choice((*_EXTREMES, dice.getrandbits(64)))
            raw = (int(number) & (1 << 64) - 1).to_bytes(8, 'little')
            self.data += raw[:struct.calcsize(code)] if first != 'b' else struct.pack('<I', int(number) & 1)
        elif first == 'd':
            self.data += struct.pack('<d', dice.choice((0.0, -1.5, float('nan'), float('inf'), 1e308)))
        elif first in 'sog':
            others = {'s': self._texts, 'o': PATHS, 'g': SIGNATURES}[first]
            self._text(first, str(value) if value is not None else dice.choice(others))
        elif first == 'v':
            inner, content = value if isinstance(value, tuple) else (dice.choice(SIGNATURES), None)
            self._text('g', inner)
            self.add(inner, content)
        elif kind == 'a{sv}':
            self._dictionary()
        elif first == 'a':
            self._array(kind[1:])
        else:
            for one in split(kind[1:-1]):
                self.add(one)

    def _align(self, to: int) -> None:
        self.data += bytes(-len(self.data) % to)

    def _text(self, kind: str, text: str) -> None:
        raw = text.encode('utf-8', 'surrogateescape')
        self.data += (bytes([len(raw)]) if kind == 'g' else struct.pack('<I', len(raw))) + raw + b'\0'

    def _array(self, item: str) -> None:
        at = len(self.data)
        self.data += bytes(4)
        self._align(_ALIGNMENT.get(item[0], 4))
        start = len(self.data)
        for _ in range(self._dice.choice((0, 1, 2, 5, 40))):
            self.add(item)
        struct.pack_into('<I', self.data, at, len(self.data) - start)

    def _dictionary(self) -> None:
        dice, at = self._dice, len(self.data)
        self.data += bytes(4)
        self._align(8)
        start = len(self.data)
        for _ in range(dice.choice((0, 0, 1, 1, 2, 4, 12))):
            self._align(8)
            if dice.random() < 0.8 and self._options:
                name = dice.choice(list(self._options))
                self.add('s', name)
                self.add('v', self._options[name]() if dice.random() < 0.7 else None)
            else:
                self.add('s')
                self.add('v')
        struct.pack_into('<I', self.data, at, len(self.data) - start)
