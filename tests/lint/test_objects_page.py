# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd-objects(7) has a row for each object, and each row is shown by a victim or a test."""

import re
from pathlib import Path

import pytest

from ckptd.objects import attributes, files, ipc, mappings, namespaces, table
from ckptd.objects.modules import modules_of
from ckptd.objects.support import Support
from tests.lib.shown import SHOWN, objects
from tests.lib.victim import names

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs' / 'ckptd-objects.7.md'


def rows_of_modules() -> dict[str, Support]:
    return {f'SUPPORT of {module.__name__.rpartition(".")[2]}': module.SUPPORT
            for package in (files, attributes, mappings, ipc, namespaces) for module in modules_of(package)
            if hasattr(module, 'SUPPORT')}


def test_the_page_is_made_from_the_rows() -> None:
    text = PAGE.read_text()
    assert table.page(text) == text, f'run: python -m ckptd.objects.table {PAGE.relative_to(ROOT)}'


def test_each_object_has_a_row() -> None:
    assert [cls.__name__ for cls in objects() if not isinstance(vars(cls).get('support'), Support)] == []


def test_each_row_is_on_the_page() -> None:
    rows = [line.split(' | ')[0].removeprefix('| ') for line in PAGE.read_text().splitlines() if line.startswith('| ')]
    for row in (*(vars(cls)['support'] for cls in objects()), *rows_of_modules().values()):
        assert rows.count(row.what) == 1, row.what


def test_what_is_shown_is_what_there_is() -> None:
    assert sorted(SHOWN) == sorted({*(cls.__name__ for cls in objects()), *rows_of_modules()})


@pytest.mark.parametrize('name', SHOWN)
def test_what_shows_it_exists(name: str) -> None:
    assert SHOWN[name]
    for shown in SHOWN[name]:
        path, _, function = shown.partition('::')
        if function:
            assert re.search(rf'^(async )?def {function}\(', (ROOT / path).read_text(), re.MULTILINE), shown
        else:
            assert shown in names()


def test_a_row_that_is_missing_is_found() -> None:
    text = PAGE.read_text()
    short = re.sub(r'^\| counters \(eventfd\).*\n', '', text, flags=re.MULTILINE)
    assert short != text
    assert table.page(short) == text


def test_a_table_that_is_missing_is_an_error() -> None:
    with pytest.raises(LookupError, match='0 sections "MEMORY"'):
        table.page(PAGE.read_text().replace('## MEMORY\n', '## STORE\n'))
