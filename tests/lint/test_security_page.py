# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/security.md has a line for each method of the API and each record of an image."""

import inspect
import re
from pathlib import Path

import pytest

from ckptd.bus.image import ImageObject
from ckptd.bus.job import JobObject
from ckptd.bus.manager import ManagerObject
from ckptd.image import records
from ckptd.image.grammar import Record
from ckptd.protocol import broker_calls
from ckptd.protocol.messages import Message
from tests.lib.bus import ROOT

PAGE = (ROOT / 'docs/security.md').read_text()


def cells(heading: str) -> set[str]:
    """Names in the first column of the table below a heading."""
    section = PAGE.split(f'## {heading}\n', 1)[1].split('\n## ', 1)[0]
    first = [line.split('|')[1] for line in section.splitlines() if line.startswith('|')]
    return set(re.findall(r'\w+', ' '.join(first)))


def methods() -> list[str]:
    return [name for cls in (ManagerObject, ImageObject, JobObject) for name, member in vars(cls).items()
            if name[:1].isupper() and inspect.iscoroutinefunction(getattr(member, 'function', member))]


def test_there_are_methods() -> None:
    assert {'Checkpoint', 'Export', 'Cancel'} <= set(methods())


@pytest.mark.parametrize('name', sorted(set(methods())))
def test_each_method(name: str) -> None:
    assert name in cells('Each call of the API')


@pytest.mark.parametrize('name', sorted(
    name for name, value in vars(records).items()
    if inspect.isclass(value) and issubclass(value, Record) and value is not Record))
def test_each_record(name: str) -> None:
    assert name in cells('Each record of an image')


@pytest.mark.parametrize('name', sorted(
    name for name, value in vars(broker_calls).items() if inspect.isclass(value) and issubclass(value, Message)
    and value.__module__ == broker_calls.__name__))
def test_each_call_of_the_broker(name: str) -> None:
    assert f'{name} ' in PAGE or f'{name},' in PAGE


def test_every_file_that_it_names_is_there() -> None:
    for name in re.findall(r'`((?:tests/)?[\w/]*test_\w+\.py)', PAGE):
        found = list(Path(ROOT, 'tests').rglob(Path(name).name))
        assert found, name
