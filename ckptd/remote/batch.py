# SPDX-License-Identifier: LGPL-2.1-or-later
"""A batch of system calls as data: a table of rows, and buffers behind it. The executor, a task that is being dumped
(borrow.py) or restored (stub.py), walks the table at once, which costs one stop in all.

    memory = row* last_row buffer*          row = u64 number, six arguments, result
"""

import os
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from ckptd.kernel.arch import x86_64 as arch

_ALL_ONES = 2**64 - 1
_REST = [[0] * (arch.ROW - length) for length in range(arch.ROW)]      # padding for a row that has so many items


class Out(NamedTuple):
    """A place in the batch's buffers. As an argument of a call it becomes its address in the tracee."""
    offset: int
    length: int


def errno_of(value: int) -> int:
    """Return the errno in the result of a system call, 0 if it succeeded. Errors are -4095 to -1 (MAX_ERRNO of
    <linux/err.h>)."""
    return -value if -4096 < value < 0 else 0


class Batch:
    """Calls and buffers, which any task can run any number of times."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows = array('Q')
        self._relocations: list[int] = []       # indices of values in rows that are offsets into the buffers
        self._pointers: list[tuple[int, int]] = []      # position in the buffers, and the offset of its target there
        self._buffers = bytearray()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def size(self) -> int:
        """Bytes of memory that the batch needs."""
        return (len(self._names) + 1) * arch.ROW * 8 + len(self._buffers)

    def buffer(self, length: int, content: bytes = b'') -> Out:
        """Add a buffer of `length` bytes, initially zero or `content`."""
        out = Out(len(self._buffers), length)
        self._buffers += content.ljust((length + 7) & ~7, b'\0')
        return out

    def pointer(self, at: int, to: Out) -> None:
        """Store the address of `to` in the eight bytes at offset `at` of the buffers."""
        self._pointers.append((at, to.offset))

    def call(self, name: str, *arguments: int | Out) -> int:
        """Add a system call. Return its number, for `Results.value`."""
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
        """Encode the table of calls and the buffers behind it for memory at address `base`."""
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
        """Decode the same memory after the run."""
        end = len(self._names) * arch.ROW * 8
        values = array('q', memory[:end])[arch.ROW - 1::arch.ROW]
        return Results(self._names, values, memory[end + len(arch.LAST_ROW) * 8:])


class Results(NamedTuple):
    """The results of one run of a batch."""
    names: Sequence[str]
    values: 'array[int]'
    contents: bytes

    def value(self, call: int) -> int:
        """Return the result of a call. OSError if it failed."""
        value = self.values[call]
        if number := errno_of(value):
            raise OSError(number, f'remote {self.names[call]}: {os.strerror(number)}')
        return value

    def or_else(self, call: int, default: int) -> int:
        """Return the result of a call, or 0 if it failed, for example because this kernel does not have it."""
        value = self.values[call]
        return value if value >= 0 else default

    def require(self) -> None:
        """Check that no call failed. OSError."""
        for call in range(len(self.values)):
            self.value(call)

    def unsigned(self, call: int) -> int:
        """Return the result of a call that cannot fail and may use the whole width of a register."""
        return self.values[call] & _ALL_ONES

    def data(self, out: Out) -> bytes:
        return self.contents[out.offset:out.offset + out.length]
