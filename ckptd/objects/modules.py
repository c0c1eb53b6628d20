# SPDX-License-Identifier: LGPL-2.1-or-later
"""The modules of a package of objects: a registry knows an object because its file is there."""

from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Import every module below a package, but for its registry, which is the one that asks. Return them."""
    return [import_module(module.name) for module in walk_packages(package.__path__, f'{package.__name__}.')
            if module.name != f'{package.__name__}.registry']
