# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much of a tree its rows tell: whoever is asked about it has to keep, and to send, what its tasks make long."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.inspect import task_rows
from ckptd.inspect.scan import scan_tree


def made(*counts: int, size: int = 100) -> Iterator[tuple[task_rows.Row, list[str | None]]]:
    for number, count in enumerate(counts):
        yield {'tid': number}, ['x' * size] * count


def taken(*counts: int) -> list[tuple[int, int]]:
    return [(len(row['fds']), row.get('fds_left_out', 0)) for row in task_rows._with_links(made(*counts))]


def test_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_rows, 'MAX_LINKS', 1000)
    assert taken(10, 11, 0, 25) == [(10, 0), (10, 1), (0, 0), (10, 15)]


def test_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_rows, 'MAX_ALL_LINKS', 1000)
    assert taken(6, 6, 1, 0) == [(6, 0), (4, 2), (0, 1), (0, 0)]


def test_bytes_count_and_what_was_closed_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_rows, 'MAX_LINKS', 10)
    [row] = task_rows._with_links([({}, [None, 'äöü', None, 'abc', None, 'x', 'y'])])
    assert row == {'fds': ['äöü', 'abc', 'x'], 'fds_left_out': 1}


def test_of_ourselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'file'
    path.touch()
    fds = [os.open(path, os.O_RDONLY) for _ in range(20)]
    try:
        [own] = [row for row in task_rows.live_rows(scan_tree([os.getpid()])) if row['tid'] == os.getpid()]
        assert [f'{fd} {path}' for fd in fds] == [link for link in own['fds'] if str(path) in link]
        assert 'fds_left_out' not in own
        monkeypatch.setattr(task_rows, 'MAX_LINKS', sum(len(link) for link in own['fds'][:-3]))
        [cut] = [row for row in task_rows.live_rows(scan_tree([os.getpid()])) if row['tid'] == os.getpid()]
        assert (cut['fds'], cut['fds_left_out']) == (own['fds'][:-3], 3)
    finally:
        for fd in fds:
            os.close(fd)
