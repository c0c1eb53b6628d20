# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which kinds there are: every subclass of Kind in a module of this package. A new kind is a new file, nothing else."""

import importlib
import pkgutil
from typing import Any

import ckptd.objects.files
from ckptd.objects.files.base import Kind, OpenFile
from ckptd.objects.files.unsupported import Unsupported


def _discover() -> tuple[Kind[Any], ...]:
    for module in pkgutil.iter_modules(ckptd.objects.files.__path__):
        if module.name != 'registry':
            importlib.import_module(f'ckptd.objects.files.{module.name}')
    kinds = [cls() for cls in Kind.__subclasses__() if cls is not Unsupported]
    tags = [kind.tag for kind in kinds]
    if len(set(tags)) != len(tags):
        raise TypeError(f'two kinds have one tag: {sorted(tags)}')
    return tuple(sorted(kinds, key=lambda kind: kind.tag))


KINDS = _discover()
UNSUPPORTED = Unsupported()
BY_TAG = {kind.tag: kind for kind in KINDS}


def kind_of(file: OpenFile) -> Kind[Any]:
    """The kind of an open file; UNSUPPORTED, which refuses, where none matches."""
    return next((kind for kind in KINDS if kind.matches(file)), UNSUPPORTED)
