# SPDX-License-Identifier: LGPL-2.1-or-later
"""All kinds: every subclass of MappingKind in a module of this package. A new kind is a new file, and nothing else
changes."""

import importlib
import pkgutil
from collections.abc import Iterator

import ckptd.objects.mappings
from ckptd.errors import Finding
from ckptd.kernel.maps import Mapping
from ckptd.objects.mappings.base import MappingKind
from ckptd.objects.mappings.special import special_memory


def _kinds_of(cls: type[MappingKind]) -> Iterator[type[MappingKind]]:
    for one in cls.__subclasses__():
        if not one.__subclasses__():
            yield one
        yield from _kinds_of(one)


def _discover() -> tuple[type[MappingKind], ...]:
    for module in pkgutil.iter_modules(ckptd.objects.mappings.__path__):
        if module.name != 'registry':
            importlib.import_module(f'ckptd.objects.mappings.{module.name}')
    return tuple(sorted(_kinds_of(MappingKind), key=lambda cls: cls.__name__))


KINDS = _discover()


class MappingKinds:
    """The kinds of one job."""

    def __init__(self) -> None:
        self.all = [cls() for cls in KINDS]
        self._by_name = {name: kind for kind in self.all for name in kind.names}
        self._matching = [kind for kind in self.all if type(kind).matches is not MappingKind.matches]

    def of(self, mapping: Mapping) -> MappingKind:
        """Return the kind of a mapping."""
        if found := self._by_name.get(mapping.path):
            return found
        for kind in self._matching:
            if kind.matches(mapping):
                return kind
        raise AssertionError(f'a mapping is of no kind: {mapping}')

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        """Return the reason why a mapping of task `tid` cannot be dumped, or what will be lost."""
        kind = self.of(mapping)
        # vvar has the flags of device memory
        return None if kind.is_kernels else special_memory(mapping) or kind.finding(tid, mapping)
