# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rows of findings: alike ones are joined, what differs is not, and each hint follows its rows."""

import io

from ckptd.cli.findings import blocks, grouped
from ckptd.cli.output import Output
from ckptd.errors import Finding


def finding(pid: int, resource: str, reason: str, hint: str = 'close it') -> Finding:
    return Finding(pid, 'server', resource, 'EOPNOTSUPP', reason, hint)


def test_many_that_are_alike() -> None:
    sockets = [finding(pid, f'fd {fd}', f'an IPv4 stream socket (socket:[{pid}{fd}])') for pid in (1, 2, 3)
               for fd in range(3, 10)]
    [row] = grouped(sockets)
    assert (row.pid, row.resource) == (1, '21 open files in 3 tasks')
    assert row.reason == 'an IPv4 stream socket (socket:[13]), and 20 alike'


def test_a_few_stay_as_they_are() -> None:
    rows = [finding(1, f'fd {fd}', f'a socket (socket:[{fd}])') for fd in (3, 4, 5)]
    assert grouped(rows) == rows


def test_one_shared_object() -> None:
    rows = [finding(pid, 'fd 3', 'a socket (socket:[77])') for pid in (1, 2)]
    [row] = grouped([*rows, finding(1, 'fd 4', 'a socket (socket:[77])')])
    assert (row.pid, row.resource, row.reason) == (1, '3 open files in 2 tasks', 'a socket (socket:[77])')
    assert [row.resource for row in grouped(rows)] == ['fd 3 in 2 tasks']


def test_what_differs_is_not_joined() -> None:
    rows = [finding(1, f'fd {fd}', 'is a device') for fd in (3, 4)]
    others = [finding(1, f'namespace {name}', f'a {name} namespace') for name in ('net', 'mnt', 'ipc', 'uts', 'user')]
    hints = [finding(1, f'fd {fd}', 'is a file', f'do {word}') for fd, word in ((5, 'this'), (6, 'that'))]
    assert grouped([*rows, *others, *hints]) == [*rows, *others, *hints]


def test_each_hint_is_with_its_rows() -> None:
    rows = [finding(1, 'fd 3', 'a socket (1)', 'one'), finding(1, 'fd 4', 'a device', 'other'),
            finding(2, 'fd 5', 'a pipe', 'one')]
    assert [(len(block.rows), block.hint) for block in blocks(rows, every=False)] == [(2, 'one'), (1, 'other')]
    stream = io.StringIO()
    Output(stdout=stream).refusals(rows)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ['PID', '1', '2', 'hint:', '1', 'hint:']


def test_every_one() -> None:
    rows = [finding(1, f'fd {fd}', f'a socket (socket:[{fd}])') for fd in range(20)]
    stream = io.StringIO()
    Output(stdout=stream, every=True).refusals(rows)
    assert len(stream.getvalue().splitlines()) == 22
    assert len(blocks(rows, every=False)[0].rows) == 1
