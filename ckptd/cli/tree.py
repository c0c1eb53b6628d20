# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl tree."""

from collections.abc import Iterable, Sequence
from typing import Any

from ckptd.cli.drawing import Line, build, count_files, draw
from ckptd.cli.output import Column, Output
from ckptd.cli.quantities import format_bytes, format_count
from ckptd.cli.session import LONG, Session
from ckptd.image.ids import is_image_id

COLUMNS = (Column('PROCESS'), Column('STATE'), Column('MEMORY', right=True), Column('FILES', right=True),
           Column('OPEN FILES', style='dim', cut=True))


async def tree(session: Session) -> int:
    """Draw the processes below a target or in an image."""
    args = session.args
    async with session.daemon() as daemon:
        if is_image_id(args.target):
            rows = await daemon.image(args.target, 'Tree', seconds=LONG)
        else:
            rows = await daemon.manager('Scan', 'sa{sv}', args.target, {}, seconds=LONG)
    if session.out.json:
        session.out.document(rows)
    else:
        draw_tree(session.out, rows, all_threads=args.threads, files=args.files)
    return 0


def draw_tree(out: Output, rows: Sequence[dict[str, Any]], *, all_threads: bool = False, files: bool = False) -> None:
    """Draw the tree as a table, with a line of totals."""
    columns = COLUMNS[:-1] if files else COLUMNS
    out.table(columns, list(_cells(draw(build(rows), all_threads=all_threads, files=files), files)), empty='No tasks.')
    if rows and out.legend:
        processes = sum(row['tid'] == row['tgid'] for row in rows)
        memory = sum(row.get('rss', 0) for row in rows)
        out.line(f'\n{format_count(processes, "process")}, '
                 f'{format_count(len(rows), "task")}, {format_bytes(memory)} resident.')


def _cells(lines: Iterable[Line], files: bool) -> Iterable[list[str]]:
    for line in lines:
        row = line.row
        cells = [line.text, '', '', ''] if row is None else [
            line.text, str(row.get('state', '')), format_bytes(row.get('rss', 0)), str(len(row.get('fds', ())))]
        yield cells if files else [*cells, ', '.join(count_files(row)) if row else '']
