# SPDX-License-Identifier: LGPL-2.1-or-later
"""Findings as rows for people: those that are alike in one row, and each hint below its rows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckptd.cli.quantities import format_count
from ckptd.errors import Finding, Severity

FEW = 3     # findings that are alike and yet listed one by one
# words for what the first word of Finding.resource names
_NOUNS = {'fd': 'open file', 'vma': 'mapping', 'pid': 'pid'}
_NUMBER = re.compile(r'\d+')
_PREFIXES: dict[Severity, str] = {'refusal': '', 'warning': 'warning: ', 'unrestorable': 'refused with --kill: '}


class Block(NamedTuple):
    """Rows of the table with one hint."""
    rows: list[list[str]]
    hint: str


def blocks(findings: Sequence[Finding], *, every: bool) -> list[Block]:
    """Arrange findings for the table PID, COMMAND, RESOURCE, ERRNO, REASON. every: without grouping."""
    rows = list(findings) if every else grouped(findings)
    return [Block([_cells(row) for row in rows if row.hint == hint], hint)
            for hint in dict.fromkeys(row.hint for row in rows)]


def grouped(findings: Iterable[Finding]) -> list[Finding]:
    """Join findings about one object, and more than FEW that differ in numbers only, in the order of the first."""
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for one in findings:
        noun = one.resource.partition(' ')[0]
        alike.setdefault((one.severity, one.errno, noun, _NUMBER.sub('#', one.reason), one.hint), []).append(one)
    return [row for group in alike.values() for row in ([_joined(group)] if len(group) > FEW else _of_each(group))]


def _of_each(group: Sequence[Finding]) -> list[Finding]:
    """Return a row for each object: the reason names it, for example by its inode."""
    objects: dict[tuple[str, ...], list[Finding]] = {}
    for one in group:
        # where the reason has no number, the resource is the object
        objects.setdefault((one.reason, '' if _NUMBER.search(one.reason) else one.resource), []).append(one)
    return [_joined(same) for same in objects.values()]


def _joined(group: Sequence[Finding]) -> Finding:
    first = group[0]
    if len(group) == 1:
        return first
    processes = len({one.pid for one in group})
    noun, _, name = first.resource.partition(' ')
    same = len({one.resource for one in group}) == 1
    what = first.resource if same or not name else format_count(len(group), _NOUNS.get(noun, noun))
    where = f' in {format_count(processes, "task")}' if processes > 1 else ''
    others = '' if len({one.reason for one in group}) == 1 else f', and {len(group) - 1} alike'
    return replace(first, resource=what + where, reason=first.reason + others)


def _cells(row: Finding) -> list[str]:
    """Return the cells of a row. The tree as a whole has no pid."""
    return [str(row.pid or '-'), row.comm or '-', row.resource, row.errno, _PREFIXES[row.severity] + row.reason]
