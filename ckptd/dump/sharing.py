# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find tasks that share a kernel object. kcmp(2) orders objects, so a bisection is enough and not every pair is
compared."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from ckptd.kernel.kcmp import EQUAL, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_VM, LESS, kcmp

M = TypeVar('M')


class Sharing(Generic[M]):
    """Ids for distinct objects, from 1. compare(a, b): 0 the same object, 1 a before b, 2 after (kcmp(2)).

    key: a property that members of one object have in common. Only members with the same key are compared.
    """

    def __init__(self, compare: Callable[[M, M], int]) -> None:
        self._compare = compare
        self._sorted: dict[Hashable, list[tuple[M, int]]] = {}
        self._last = 0

    def id_of(self, member: M, key: Hashable = None) -> tuple[int, bool]:
        """Return (id, True if this member is the first of its object)."""
        known = self._sorted.setdefault(key, [])
        low, high = 0, len(known)
        while low < high:
            middle = (low + high) // 2
            order = self._compare(member, known[middle][0])
            if order == EQUAL:
                return known[middle][1], False
            low, high = (low, middle) if order == LESS else (middle + 1, high)
        self._last += 1
        known.insert(low, (member, self._last))
        return self._last, True

    def __len__(self) -> int:
        return self._last


class TaskSharing:
    """The mm, files, fs and sighand ids of tasks."""

    def __init__(self) -> None:
        self.mm = Sharing[int](lambda a, b: kcmp(a, b, KCMP_VM))
        self.files = Sharing[int](lambda a, b: kcmp(a, b, KCMP_FILES))
        self.fs = Sharing[int](lambda a, b: kcmp(a, b, KCMP_FS))
        self.sighand = Sharing[int](lambda a, b: kcmp(a, b, KCMP_SIGHAND))
