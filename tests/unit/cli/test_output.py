# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables, errors and JSON, as a pipe and as a terminal get them."""

import io
import json
import re

import pytest

from ckptd.cli.output import Column, Output, plain_table, printable, use_colour
from ckptd.cli.progress import ProgressBar
from ckptd.errors import Finding, Refused, finding_from

COLUMNS = (Column('NAME'), Column('SIZE', right=True))
ROWS = [['a', '1'], ['long name', '100']]
REFUSAL = Finding(12, 'nginx', 'fd 5', 'EOPNOTSUPP', 'a socket', 'close it')


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def piped(**options: bool) -> Output:
    return Output(stdout=io.StringIO(), stderr=io.StringIO(), **options)


def text(stream: object) -> str:
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_a_table_in_a_pipe_is_aligned_and_nothing_is_cut_off() -> None:
    assert plain_table(COLUMNS, [*ROWS, ['x' * 300, '2']])[:2] == ['NAME'.ljust(302) + 'SIZE', 'a'.ljust(302) + '   1']


def test_a_table_without_legend_has_rows_only() -> None:
    assert plain_table(COLUMNS, ROWS, legend=False) == ['a            1', 'long name  100']


def test_a_listing_ends_with_its_count() -> None:
    out = piped()
    out.table(COLUMNS, ROWS, what='images')
    assert text(out.stdout).endswith('\n\n2 images listed.\n')


def test_an_empty_listing_leaves_stdout_empty() -> None:
    out = piped()
    out.table(COLUMNS, [], empty='No images.')
    assert (text(out.stdout), text(out.stderr)) == ('', 'No images.\n')


def test_a_terminal_gets_colour_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('TERM', 'xterm')
    assert use_colour(Terminal())
    assert not use_colour(io.StringIO())
    monkeypatch.setenv('NO_COLOR', '1')
    assert not use_colour(Terminal())


def test_a_terminal_gets_a_table_without_escapes_when_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('NO_COLOR', '1')
    monkeypatch.setenv('COLUMNS', '80')
    out = Output(stdout=Terminal(), stderr=Terminal())
    out.table((Column('NAME', style='bold red'), Column('SIZE', right=True)), ROWS)
    assert '\x1b' not in text(out.stdout)
    assert text(out.stdout).splitlines()[1].split() == ['a', '1']


def test_a_terminal_too_narrow_cuts_only_what_may_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('NO_COLOR', '1')
    monkeypatch.setenv('COLUMNS', '40')
    out = Output(stdout=Terminal(), stderr=Terminal())
    out.table((Column('PROCESS'), Column('FILES', cut=True)), [['server 123456789', '/one, ' * 30]])
    line = text(out.stdout).splitlines()[1]
    assert line.startswith('server 123456789')
    assert line.rstrip().endswith('…')
    assert len(line) <= 40


def test_an_error_is_one_line_then_its_refusals_then_hints() -> None:
    out = piped()
    out.error(Refused.because([REFUSAL]), 'checkpoint')
    assert text(out.stdout) == ''
    assert text(out.stderr).splitlines() == [
        'ckptctl: checkpoint: nginx[12]: fd 5: a socket (EOPNOTSUPP)',
        'PID  COMMAND  RESOURCE  ERRNO       REASON',
        ' 12  nginx    fd 5      EOPNOTSUPP  a socket',
        'hint: close it']


def test_a_hint_of_many_refusals_is_said_once() -> None:
    out = piped()
    out.refusals([REFUSAL] * 3)
    assert text(out.stdout).count('hint:') == 1


def test_an_error_as_json_is_one_object_on_stdout() -> None:
    out = piped(json=True)
    out.error(Refused.because([REFUSAL]), 'checkpoint')
    error = json.loads(text(out.stdout))['error']
    assert text(out.stderr) == ''
    assert (error['name'], error['exit_status']) == ('Refused', 3)
    assert error['refusals'][0]['resource'] == 'fd 5'


def test_json_silences_everything_else() -> None:
    out = piped(json=True)
    out.line('x')
    out.note('y')
    out.table(COLUMNS, ROWS, what='images')
    out.refusals([REFUSAL])
    out.document({'z': 1})
    assert (text(out.stdout), text(out.stderr)) == ('{"z": 1}\n', '')


@pytest.mark.parametrize(('given', 'shown'), [
    ('plain ├─ text', 'plain ├─ text'), ('\x1b[31mred', '\\x1b[31mred'), ('tab\there', 'tab\\there'),
    ('\x9b1m', '\\x9b1m'), ('\u202eevil', '\\u202eevil')])
def test_what_a_terminal_would_obey_is_shown_instead(given: str, shown: str) -> None:
    assert printable(given) == shown


def test_a_row_of_check_becomes_a_refusal_whatever_it_lacks() -> None:
    refusal = finding_from({'pid': 3, 'reason': 'because', 'severity': 'warning', 'unknown': 1})
    assert (refusal.pid, refusal.comm, refusal.severity) == (3, '', 'warning')


@pytest.mark.parametrize('width', [80, 100, 140])
def test_the_progress_bar_fits_on_its_line(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv('COLUMNS', str(width))
    monkeypatch.setenv('NO_COLOR', '1')
    monkeypatch.setenv('TERM', 'xterm')
    stream = Terminal()
    with ProgressBar(Output(stderr=stream), '20240131_235959_postgres_3fa9') as bar:
        bar.update('memory', 0.999, (1023 << 30) + (1 << 29), (1023 << 30) + (1 << 29))
        bar.update('fill', 1.0, 999 << 20, (45 << 30) + 1)
    shown = [line for line in re.split(r'\r|\n|\x1b\[\?25[hl]|\x1b\[\d?[AK]', text(stream)) if line]
    assert any('100% filling memory 999 MiB of 45.0 GiB' in ' '.join(line.split()) for line in shown), shown
    # the name is what people type
    assert all(line.startswith('20240131_235959_postgre') for line in shown)
    assert width == 80 or all(line.startswith('20240131_235959_postgres_3fa9 ') for line in shown)
    assert max(map(len, shown)) <= width
