# SPDX-License-Identifier: LGPL-2.1-or-later
"""All kinds: every subclass of Kind in a module below this package. A new kind is a new file: nothing else changes."""

from collections.abc import Mapping
from typing import Any, Self

from ckptd.image.grammar import Struct
from ckptd.objects import files
from ckptd.objects.files.base import Kind, OpenFile
from ckptd.objects.files.inherited import InheritedKind, dump_inherited
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.unsupported import Unsupported
from ckptd.objects.modules import modules_of


def _discover() -> tuple[type[Kind[Any]], ...]:
    modules_of(files)
    kinds = [cls for cls in Kind.__subclasses__() if cls is not Unsupported]
    tags = [kind.tag for kind in kinds]
    if len(set(tags)) != len(tags):
        raise TypeError(f'two kinds have one tag: {sorted(tags)}')
    return tuple(sorted(kinds, key=lambda kind: kind.tag))


BY_TAG = {kind.tag: kind for kind in _discover()}


class Kinds:
    """The kinds of one job. `with` closes everything that they have opened."""

    def __init__(self, tables: JobTables | None = None) -> None:
        self.tables = tables or JobTables()
        self.by_tag: Mapping[str, Kind[Any]] = {tag: cls(self.tables) for tag, cls in BY_TAG.items()}
        self.unsupported = Unsupported(self.tables)
        self._unlike = [kind for kind in self.by_tag.values() if not kind.alike]
        self._with_queues = [kind for kind in self.by_tag.values() if type(kind).peek_offset is not Kind.peek_offset]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, file: OpenFile) -> Kind[Any]:
        """Return the kind of an open file. If none matches it is `unsupported`, which refuses."""
        return next((kind for kind in self.by_tag.values() if kind.matches(file)), self.unsupported)

    def inherited(self, file: OpenFile) -> tuple[str, Struct] | None:
        """Return the tag and the record of a file that the caller of a restart gives, None for another one."""
        what = self.of(file).inherited(file)
        return (InheritedKind.tag, dump_inherited(file, what)) if what else None

    def is_unlike_others(self, file: OpenFile) -> bool:
        """Whether the findings about a file may differ from those about one that looks the same (Kind.alike)."""
        return any(kind.matches(file) for kind in self._unlike)

    def may_have_queue(self, file: OpenFile) -> bool:
        """Whether a kind that walks queues matches this file."""
        return any(kind.matches(file) for kind in self._with_queues)

    def close(self) -> None:
        for kind in self.by_tag.values():
            kind.close()
