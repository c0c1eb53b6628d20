# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree as text."""

from typing import Any

from ckptd.cli.drawing import build, count_files, draw


def row(tid: int, comm: str, parent: int = 0, tgid: int = 0, fds: tuple[str, ...] = ()) -> dict[str, Any]:
    return {'tid': tid, 'tgid': tgid or tid, 'ppid': parent, 'parent_tid': parent, 'comm': comm, 'state': 'S',
            'rss': 0, 'fds': list(fds)}


TREE = [row(10, 'sh'), row(11, 'server', 10), row(12, 'io', 11, 11), row(13, 'io', 11, 11), row(14, 'gc', 11, 11),
        row(20, 'child', 13), row(30, 'sleep', 10)]


def lines(rows: list[dict[str, Any]], **options: bool) -> list[str]:
    return [line.text for line in draw(build(rows), **options)]


def test_processes_hang_below_their_parents_and_threads_of_one_name_share_a_line() -> None:
    assert lines(TREE) == [
        'sh 10',
        '├─server 11',
        '│ ├─{io} x 2 threads',
        '│ ├─{gc} 14',
        '│ └─child 20',
        '└─sleep 30']


def test_every_thread_can_be_drawn() -> None:
    assert lines(TREE, all_threads=True)[2:5] == ['│ ├─{io} 12', '│ ├─{io} 13', '│ ├─{gc} 14']


def test_a_child_of_a_thread_is_drawn_below_its_process() -> None:
    [root] = build(TREE)
    assert [child.row['comm'] for child in root.children[0].children] == ['child']


def test_trees_without_a_common_root_are_drawn_one_after_the_other() -> None:
    assert lines([row(1, 'one'), row(2, 'two', 99), row(3, 'three', 2)]) == ['one 1', 'two 2', '└─three 3']


def test_the_last_thread_of_a_process_without_children_closes_its_branch() -> None:
    assert lines([row(1, 'one'), row(2, 'a', 1, 1), row(3, 'b', 1, 1)]) == ['one 1', '├─{a} 2', '└─{b} 3']


def test_open_files_stand_below_their_process() -> None:
    null = tuple(f'{fd} /dev/null' for fd in (0, 1, 2, 5))
    rows = [row(1, 'one', fds=(*null, '7 pipe:[7]')), row(2, 'two', 1)]
    assert lines(rows, files=True) == ['one 1', '│ 0-2,5 /dev/null', '│ 7 pipe:[7]', '└─two 2']
    assert count_files(rows[0]) == ['0-2,5 /dev/null', '7 pipe:[7]']


def test_a_chain_deeper_than_python_recurses_is_drawn() -> None:
    chain = [row(1, 'p')] + [row(tid, 'p', tid - 1) for tid in range(2, 3001)]
    assert len(lines(chain)) == 3000


def test_no_rows_draw_nothing() -> None:
    assert lines([]) == []
