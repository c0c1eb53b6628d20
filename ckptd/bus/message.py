# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parts of messages other than bytes: types, flags, the fds that come with them, errors. Pure."""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Final

from ckptd.kernel.closing import close_foreign


class MessageType(IntEnum):
    CALL = 1
    RETURN = 2
    ERROR = 3
    SIGNAL = 4


NO_REPLY_EXPECTED: Final = 1
ALLOW_INTERACTIVE: Final = 4


class ProtocolError(Exception):
    """The bus sent bytes that are not a message. The connection cannot go on."""


class DBusError(Exception):
    """An error on the bus: the answer that a call got, or is to get.

    body: of the error message, as plain values. By convention the first is a sentence.
    """

    def __init__(self, name: str, message: str, body: Sequence[Any] = ()) -> None:
        super().__init__(f'{name}: {message}')
        self.name, self.message, self.body = name, message, tuple(body)


class UnixFd(int):
    """An open file descriptor inside a value. On the wire it is an index into the fds of its message, so a number that
    a client writes into a variant never becomes an fd."""


class Fds:
    """File descriptors that came with a message. They are closed with it unless taken."""
    __slots__ = ('_open', 'count')

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._open = list(fds)
        self.count = len(self._open)

    def __getitem__(self, index: int) -> UnixFd:
        if not 0 <= index < self.count:
            raise ProtocolError(f'fd index {index} in a message with {self.count} fds')
        return UnixFd(self._open[index])

    def add(self, fds: Iterable[int]) -> None:
        self._open.extend(fds)
        self.count = len(self._open)

    def take(self, fd: int) -> int:
        """Hand this fd over to the caller; -1 stays in its place."""
        self._open[self._open.index(fd)] = -1
        return fd

    def close(self) -> None:
        """Close the fds that were not taken. A second call does nothing."""
        for index, fd in enumerate(self._open):
            if fd >= 0:
                self._open[index] = -1
                close_foreign(fd)
