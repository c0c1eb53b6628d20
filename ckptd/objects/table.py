# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tables of ckptd-objects(7), made from the rows of all objects.

    python -m ckptd.objects.table docs/ckptd-objects.7.md     writes them into that page

Each section of the page that TABLES names has one table.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from ckptd.objects import attributes, files, ipc, mappings, namespaces
from ckptd.objects.modules import modules_of
from ckptd.objects.support import Support

# the package of the objects, by section of the page
TABLES: Mapping[str, ModuleType] = {'OPEN FILES': files, 'TASKS': attributes, 'MEMORY': mappings,
                                    'SYSTEM V IPC': ipc, 'NAMESPACES': namespaces}
_HEADING = '| | dumped | restored | |\n|---|---|---|---|\n'
_TABLE = r'(^## {}\n(?:(?!## |\|).*\n)*)(?:\|.*\n)+'


def rows(package: ModuleType) -> list[Support]:
    """Return the rows of a package: those of its classes, and SUPPORT of modules without one. Each row once."""
    found = {row: None for module in modules_of(package) for row in _rows_of(module)}
    return sorted(found, key=lambda row: row.what.lower())


def _rows_of(module: ModuleType) -> Iterator[Support]:
    for value in vars(module).values():
        if isinstance(value, Support):
            yield value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            row = vars(value).get('support')
            if isinstance(row, Support):
                yield row


def markdown(package_rows: Iterable[Support]) -> str:
    """Return a table."""
    return _HEADING + ''.join(f'| {row.what} | {row.dumped} | {row.restored} | {_exceptions(row)} |\n'
                              for row in package_rows)


def _exceptions(row: Support) -> str:
    """Return the last cell: one sentence for each exception."""
    found = {'Refused': row.refused, 'Lost': row.warned, 'As a user': row.user}
    return ' '.join(f'{word}: {text}.' for word, text in found.items() if text) or 'All of it.'


def page(text: str) -> str:
    """Return the page with its tables as they should be. LookupError if it lacks a section or its table."""
    for section, package in TABLES.items():
        found = list(re.finditer(_TABLE.format(section), text, flags=re.M))
        if len(found) != 1:
            raise LookupError(f'the page has {len(found)} sections "{section}" with a table')
        text = text[:found[0].end(1)] + markdown(rows(package)) + text[found[0].end():]
    return text


if __name__ == '__main__':
    target = Path(sys.argv[1])
    target.write_text(page(target.read_text()))
