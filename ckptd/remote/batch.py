# SPDX-License-Identifier: LGPL-2.1-or-later
"""A batch of system calls as data: a table of rows, and buffers behind it. Who does them, a task that is being dumped
(remote.py) or one that is being restored (puppet.py), walks the table in one go, for one stop in all.

    memory = row* last_row buffer*          row = u64 number, six arguments, result
"""

import os
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from ckptd.kernel.arch import x86_64 as arch

_ALL_ONES = 2**64 - 1
_REST = [[0] * (arch.ROW - length) for length in range(arch.ROW)]      # of a row that has so much


class Out(NamedTuple):
    """A place in the batch's buffers; as an argument of a call it becomes its address in the tracee."""
    offset: int
    length: int


class Batch:
    """Calls and buffers, to be run any number of times, by any task."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows = array('Q')
        self._relocations: list[int] = []       # indices of rows whose values are offsets into the buffers
        self._pointers: list[tuple[int, int]] = []      # where in the buffers, to what offset of theirs
        self._buffers = bytearray()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def size(self) -> int:
        """Bytes of memory that it takes."""
        return (len(self._names) + 1) * arch.ROW * 8 + len(self._buffers)

    def buffer(self, length: int, content: bytes = b'') -> Out:
        """Room for `length` bytes, zero or `content` at first."""
        out = Out(len(self._buffers), length)
        self._buffers += content.ljust((length + 7) & ~7, b'\0')
        return out

    def pointer(self, at: int, to: Out) -> None:
        """Have the eight bytes at offset `at` of the buffers hold the address of `to`."""
        self._pointers.append((at, to.offset))

    def call(self, name: str, *arguments: int | Out) -> int:
        """Add a system call; the number is for `Results.value`."""
        self._names.append(name)
        row = [arch.NR[name]]
        for argument in arguments:
            if isinstance(argument, Out):
                self._relocations.append(len(self._rows) + len(row))
                row.append(argument.offset)
            else:
                row.append(argument & _ALL_ONES)
        self._rows.extend(row + _REST[len(row)])
        return len(self._names) - 1

    def encode(self, base: int) -> bytes:
        """The table of calls and the buffers behind it, for memory at address `base`."""
        rows = self._rows + arch.LAST_ROW
        buffers = base + len(rows) * rows.itemsize
        for index in self._relocations:
            rows[index] += buffers
        if not self._pointers:
            return rows.tobytes() + self._buffers
        filled = bytearray(self._buffers)
        for at, to in self._pointers:
            filled[at:at + 8] = (buffers + to).to_bytes(8, 'little')
        return rows.tobytes() + filled

    def decode(self, memory: bytes) -> 'Results':
        """What the same memory holds after the run."""
        end = len(self._names) * arch.ROW * 8
        values = array('q', memory[:end])[arch.ROW - 1::arch.ROW]
        return Results(self._names, values, memory[end + len(arch.LAST_ROW) * 8:])


class Results(NamedTuple):
    """Of one run of a batch."""
    names: Sequence[str]
    values: 'array[int]'
    contents: bytes

    def value(self, call: int) -> int:
        """What the call returned; OSError if it failed."""
        value = self.values[call]
        if -4096 < value < 0:
            raise OSError(-value, f'remote {self.names[call]}: {os.strerror(-value)}')
        return value

    def or_else(self, call: int, default: int) -> int:
        """What the call returned; the default if it failed, as one that this kernel does not have."""
        value = self.values[call]
        return value if value >= 0 else default

    def require(self) -> None:
        """OSError if any call failed."""
        for call in range(len(self.values)):
            self.value(call)

    def unsigned(self, call: int) -> int:
        """What a call returned that cannot fail, and may use the whole width of a register."""
        return self.values[call] & _ALL_ONES

    def data(self, out: Out) -> bytes:
        return self.contents[out.offset:out.offset + out.length]
