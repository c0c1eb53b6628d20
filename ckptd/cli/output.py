# SPDX-License-Identifier: LGPL-2.1-or-later
"""Output of ckptctl: tables, one JSON document, errors. Colour and rich are used only on a terminal and without
NO_COLOR.

rich takes a tenth of a second to import, as long as everything else in a listing, so output to a pipe does not use it.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Any

from ckptd.cli.findings import blocks
from ckptd.errors import CkptError, Finding

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""
    title: str
    right: bool = False    # right-aligned, for numbers
    style: str = ''        # a rich style
    fold: bool = False     # on a narrow terminal, continue in the next line
    cut: bool = False      # on a narrow terminal, end in an ellipsis


REFUSALS = (Column('PID', right=True), Column('COMMAND', style='bold'), Column('RESOURCE', fold=True),
            Column('ERRNO', style='red'), Column('REASON', fold=True))


def use_colour(stream: IO[str]) -> bool:
    """Whether to use colour. A NO_COLOR that is not empty turns it off (https://no-color.org)."""
    return stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


@dataclass(slots=True)
class Output:
    """The output of a command: results go to stdout, everything else to stderr. json: stdout has JSON only. every: no
    finding stands for others that are alike."""
    json: bool = False
    legend: bool = True
    every: bool = False
    stdout: IO[str] = field(default_factory=lambda: sys.stdout)
    stderr: IO[str] = field(default_factory=lambda: sys.stderr)

    def document(self, value: Any) -> None:
        """Print a JSON document on stdout, indented if stdout is a terminal."""
        text = json.dumps(value, ensure_ascii=False, indent=2 if self.stdout.isatty() else None)
        self._write(self.stdout, text)

    def line(self, text: str = '', style: str = '') -> None:
        """Print one line of a result. With --json print nothing."""
        if not self.json:
            self._styled(self.stdout, text, style)

    def note(self, text: str, style: str = '') -> None:
        """Print one line of additional information on stderr. With --json print nothing."""
        if not self.json:
            self._styled(self.stderr, text, style)

    def passing_note(self, text: str) -> None:
        """Print additional information on a terminal that is about to show something else, and clear the line again."""
        if self.json:
            return
        if self.stderr.isatty() and os.environ.get('TERM') != 'dumb':
            self.stderr.write(f'{text}\r\x1b[2K')
            self.stderr.flush()
        else:
            self.note(text)

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[str]], *, empty: str = '',
              what: str = '') -> None:
        """Print a list on stdout. empty: printed on stderr if there are no rows. what: plural noun for the closing
        count."""
        rows = list(rows)
        if not rows:
            if self.legend and empty:
                self.note(empty)
            return
        self._table(self.stdout, columns, rows, legend=self.legend)
        if self.legend and what:
            self.line(f'\n{len(rows)} {what if len(rows) != 1 else what.removesuffix("s")} listed.')

    def refusals(self, refusals: Sequence[Finding], *, on_stderr: bool = False) -> None:
        """Print the reasons why a tree cannot be dumped, those that are alike in one row; each hint after its rows."""
        if self.json or not refusals:
            return
        stream = self.stderr if on_stderr else self.stdout
        rows: list[list[str]] = []
        hints: dict[int, str] = {}
        for block in blocks(refusals, every=self.every):
            rows += block.rows
            if block.hint:
                hints[len(rows) - 1] = f'hint: {block.hint}'
        self._table(stream, REFUSALS, rows, notes=hints)

    def error(self, error: CkptError, command: str) -> None:
        """Print the error on stderr: one line, a row for each refusal, a hint. With --json print one object on
        stdout."""
        if self.json:
            self.document({'error': {'name': error.name, 'message': error.message, **error.details(),
                                     'exit_status': error.exit_status}})
            return
        where = f'ckptctl: {command}: ' if command else 'ckptctl: '
        self._styled(self.stderr, where + error.message, 'bold red')
        self.refusals(error.refusals, on_stderr=True)
        if error.hint and error.hint not in {refusal.hint for refusal in error.refusals}:
            self._styled(self.stderr, f'hint: {error.hint}', 'dim')

    def console(self, stream: IO[str]) -> 'Console':
        """Return a rich console that adds nothing to the printed text."""
        from rich.console import Console
        # rich's own no_color keeps bold and underline
        return Console(file=stream, highlight=False, markup=False, emoji=False,
                       color_system='auto' if use_colour(stream) else None)

    def _table(self, stream: IO[str], columns: Sequence[Column], rows: Sequence[Sequence[str]],
               legend: bool = True, notes: Mapping[int, str] | None = None) -> None:
        """Print a table. notes: lines that follow rows, by the number of the row."""
        if self.json:
            return
        # a name with a newline must not look like another row
        rows = [[printable(cell).replace('\n', '\\n') for cell in row] for row in rows]
        notes = {number: printable(note) for number, note in (notes or {}).items()}
        if stream.isatty():
            self._rich_table(stream, columns, rows, legend, notes)
            return
        lines = plain_table(columns, rows, legend)
        for number in sorted(notes, reverse=True):
            lines.insert(number + 1 + legend, notes[number])
        self._write(stream, '\n'.join(lines))

    def _rich_table(self, stream: IO[str], columns: Sequence[Column], rows: Sequence[Sequence[str]],
                    legend: bool, notes: Mapping[int, str]) -> None:
        from rich.table import Table
        from rich.text import Text
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=legend, header_style='underline', pad_edge=False)
        for column in columns:
            table.add_column(column.title, justify='right' if column.right else 'left', style=column.style,
                             no_wrap=not (column.fold or column.cut))
        for number, row in enumerate(rows):
            cells = [Text(cell, no_wrap=column.cut or None, overflow='ellipsis' if column.cut else 'fold')
                     for cell, column in zip(row, columns, strict=True)]
            if number in notes:
                cells[-1].append(f'\n{notes[number]}', 'dim')
            table.add_row(*cells)
        self.console(stream).print(table)

    def _styled(self, stream: IO[str], text: str, style: str) -> None:
        text = printable(text)
        if style and use_colour(stream):
            codes = ';'.join(_SGR[word] for word in style.split())
            text = f'\x1b[{codes}m{text}\x1b[0m'
        self._write(stream, text)

    def _write(self, stream: IO[str], text: str) -> None:
        stream.write(text + '\n')
        stream.flush()


_SGR = {'bold': '1', 'dim': '2', 'red': '31', 'green': '32', 'yellow': '33', 'cyan': '36'}


def printable(text: str) -> str:
    """Return text that is safe for a terminal. Names of processes and files may have any bytes, so control characters
    are shown as escapes."""
    return text if text.isprintable() else ''.join(map(_visible, text))


def _visible(char: str) -> str:
    if char.isprintable() or char == '\n':
        return char
    return char.encode('unicode_escape').decode()


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], legend: bool = True) -> list[str]:
    """Format columns two blanks apart, with nothing cut off, for pipes and files."""
    lines = [[column.title for column in columns]] if legend else []
    lines += [list(row) for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))] if lines else []
    return ['  '.join(cell.rjust(width) if column.right else cell.ljust(width)
                      for cell, width, column in zip(line, widths, columns, strict=True)).rstrip() for line in lines]


def finding_dict(refusal: Finding) -> dict[str, Any]:
    return asdict(refusal)
