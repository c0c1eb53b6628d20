# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draw a process tree as lines of text. Pure: rows of Manager.Scan or Image.Tree in, cells of a table out."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
TEE, CORNER, BAR, BLANK = '├─', '└─', '│ ', '  '


@dataclass(slots=True)
class Node:
    """One process: its leader's row, its other threads, its child processes."""
    row: Row
    threads: list[Row] = field(default_factory=list)
    children: list['Node'] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the drawing: the branches to the left, the label, and the process (None on a line of threads)."""
    branches: str
    label: str
    row: Row | None
    detail: str = ''

    @property
    def state(self) -> str:
        return str(self.row.get('state', '')) if self.row else ''

    @property
    def text(self) -> str:
        return self.branches + self.label


def build(rows: Sequence[Row]) -> list[Node]:
    """Build the trees and return their roots. Rows are in depth-first order: a parent's row comes before its
    children's.

    A task hangs below the process of the thread that created it. A task whose creator is not in the rows is a root.
    """
    by_tid: dict[int, Node] = {}
    roots: list[Node] = []
    for row in rows:
        if row['tid'] != row['tgid'] and row['tgid'] in by_tid:
            owner = by_tid[row['tgid']]
            owner.threads.append(row)
            by_tid[row['tid']] = owner      # a child of this thread is drawn below its process
            continue
        node = Node(row)
        parent = by_tid.get(row.get('parent_tid') or row['ppid'])
        (parent.children if parent else roots).append(node)
        by_tid[row['tid']] = node
    return roots


def draw(roots: Sequence[Node], *, all_threads: bool = False, files: bool = False) -> Iterator[Line]:
    """Yield the lines from top to bottom. Threads with one name share a line unless all_threads is set. files: add a
    line for each open file.

    It uses an explicit stack, because a tree may be deeper than Python's recursion limit.
    """
    stack = [(node, '', '') for node in reversed(roots)]
    while stack:
        node, branch, indent = stack.pop()
        yield Line(branch, f'{node.row["comm"]} {node.row["tid"]}', node.row)
        stem = indent + (BAR if node.children else BLANK)
        extra = list(_thread_labels(node.threads, all_threads))
        yield from (Line(indent + (TEE if node.children or index < len(extra) - 1 else CORNER), label, None)
                    for index, label in enumerate(extra))
        if files:
            yield from (Line(stem, link, None) for link in count_files(node.row))
        last = len(node.children) - 1
        stack += [(child, indent + (CORNER if index == last else TEE), indent + (BLANK if index == last else BAR))
                  for index, child in reversed(list(enumerate(node.children)))]


def _thread_labels(threads: Sequence[Row], every: bool) -> Iterator[str]:
    if every:
        yield from (f'{{{row["comm"]}}} {row["tid"]}' for row in threads)
        return
    for comm, count in Counter(row['comm'] for row in threads).items():
        if count == 1:
            yield f'{{{comm}}} {next(row["tid"] for row in threads if row["comm"] == comm)}'
        else:
            yield f'{{{comm}}} x {count} threads'


def count_files(row: Row) -> list[str]:
    """List the open files, grouped by name: ['0-2 /dev/null', '3,5 pipe:[7]']. A row has 'FD LINK' for each file."""
    by_link: dict[str, list[int]] = {}
    for file in row.get('fds', ()):
        number, _, link = file.partition(' ')
        by_link.setdefault(link, []).append(int(number))
    more = [f'and {row["fds_left_out"]} more'] if row.get('fds_left_out') else []
    return [*(f'{_ranges(numbers)} {link}' for link, numbers in by_link.items()), *more]


def _ranges(numbers: list[int]) -> str:
    """Return '0-2,5' for [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ','.join(str(run[0]) if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)
