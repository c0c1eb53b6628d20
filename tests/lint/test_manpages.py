# SPDX-License-Identifier: LGPL-2.1-or-later
"""The man pages: groff, mandoc, man and lexgrog find nothing wrong with them, and no word of a manual is lost."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from docs.manpage import UnknownMarkup, filled, man_page

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob('docs/*.[1-8].md'))
NAMES = [source.stem for source in SOURCES]
# images of Ubuntu without manuals divert man(1) to a script that says so
MAN = shutil.which('man.REAL') or 'man'
DATE = '2001-02-03'


def build(into: Path, *sources: Path) -> subprocess.CompletedProcess[str]:
    """What the Makefile runs."""
    return subprocess.run([sys.executable, 'docs/manpage.py', '--release', '9.8.7', '--into', into, *sources],
                          cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, 'SOURCE_DATE_EPOCH': '981212400'})


@pytest.fixture(scope='module')
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with man1, man7 and man8."""
    directory = tmp_path_factory.mktemp('man')
    done = build(directory, *SOURCES)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    return directory


def page(pages: Path, name: str) -> Path:
    return pages / f'man{name[-1]}' / name


def shown(*command: str | Path, width: int = 80) -> str:
    """What a reader prints, as plain text. It must not complain."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT,
                          env={**os.environ, 'MANWIDTH': str(width), 'LC_ALL': 'C.UTF-8', 'MAN_KEEP_FORMATTING': '',
                               'GROFF_NO_SGR': '1', 'MANOPT': ''})
    assert (done.returncode, done.stderr) == (0, ''), done.stdout
    return re.sub('.\b', '', done.stdout)


def source(name: str) -> str:
    return (ROOT / 'docs' / f'{name}.md').read_text()


def test_there_are_pages() -> None:
    assert {'ckptctl.1', 'ckptd.8', 'org.ckptd1.7', 'ckptd-restore-limits.7',
            'ckptd-objects.7'} == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_the_title_line(pages: Path, name: str) -> None:
    text = page(pages, name).read_text()
    [title] = re.findall(r'^\.TH (.*)$', text, re.MULTILINE)
    upper, chapter = name[:-2].upper(), name[-1]
    assert re.fullmatch(rf'{re.escape(upper)} {chapter} {DATE} "ckptd 9\.8\.7" "[\w ]+"', title)
    assert text.startswith(('.TH ', "'\\\" t\n.TH "))
    assert ("'\\\" t\n" in text) == ('\n.TS\n' in text)


@pytest.mark.parametrize('name', NAMES)
def test_the_sections(pages: Path, name: str) -> None:
    sections = re.findall(r'^\.SH "?([^"\n]*)"?$', page(pages, name).read_text(), re.MULTILINE)
    assert sections[:3] == ['NAME', 'SYNOPSIS', 'DESCRIPTION']
    assert sections == re.findall(r'^## (.*)$', source(name), re.MULTILINE)
    assert sections[-1] == 'SEE ALSO'


@pytest.mark.needs('man')
@pytest.mark.parametrize('name', NAMES)
def test_groff_warns_of_nothing(pages: Path, name: str) -> None:
    assert shown('groff', '-t', '-k', '-man', '-Tutf8', '-ww', page(pages, name))


@pytest.mark.needs('mandoc')
@pytest.mark.parametrize('name', NAMES)
def test_mandoc_lint_is_clean(pages: Path, name: str) -> None:
    """Style, too; only that it would look for other pages on this machine is left out."""
    done = subprocess.run(['mandoc', '-T', 'lint', page(pages, name)], capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if 'referenced manual not found' not in line] == []


@pytest.mark.needs('man')
@pytest.mark.parametrize('name', NAMES)
def test_man_finds_and_shows_it(pages: Path, name: str) -> None:
    program, chapter = name[:-2], name[-1]
    text = shown(MAN, '-M', pages, program)
    assert text == shown(MAN, '-l', page(pages, name))
    lines = text.splitlines()
    assert lines[0].startswith(f'{program.upper()}({chapter})')
    assert DATE in lines[-1]
    for title in ('NAME', 'SYNOPSIS', 'DESCRIPTION'):
        assert title in lines


@pytest.mark.needs('man')
@pytest.mark.parametrize('name', NAMES)
def test_whatis_has_its_line(pages: Path, name: str) -> None:
    """lexgrog(1) is what mandb(8) takes that line with."""
    line = shown('lexgrog', page(pages, name)).partition(': ')[2].strip().strip('"')
    wanted = source(name).partition('## NAME\n\n')[2].partition('\n\n')[0]
    assert line == ' '.join(wanted.split())


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r'[A-Za-z0-9_]+', text))


def without_markup(markdown: str) -> str:
    """The text of a manual: without its title, comments, targets of links, and headings of tables that become
    paragraphs."""
    text = re.sub(r'<!--.*?-->', '', markdown.partition('\n')[2], flags=re.DOTALL)
    text = re.sub(r'^\|.*\| \|\n\|[-|]+\|\n', '', text, flags=re.MULTILINE)
    text = re.sub(r'^```\w*$', '', text, flags=re.MULTILINE)
    return re.sub(r'\]\([^)\s]*\.[^)\s]*\)', ']', text)


@pytest.mark.needs('man')
@pytest.mark.parametrize('name', NAMES)
def test_no_word_is_lost(pages: Path, name: str) -> None:
    assert words(without_markup(source(name))) - words(shown(MAN, '-l', page(pages, name), width=1000)) == Counter()


@pytest.mark.needs('man')
@pytest.mark.parametrize('name', NAMES)
def test_it_fits_on_a_terminal(pages: Path, name: str) -> None:
    """All but examples, whose lines are the source's."""
    code = {line.strip() for line in source(name).splitlines()}
    wide = [line for line in shown(MAN, '-l', page(pages, name)).splitlines() if len(line) > 80]
    assert [line for line in wide if line.strip() not in code] == []


@pytest.mark.parametrize(('markdown', 'roff'), [
    ("'.so' at the start of a line", r"\(aq.so\(aq at the start of a line"),
    ('.so etc.', r'\&.so etc.'),
    ('`--json` and C:\\x', r'\fB\-\-json\fP and C:\ex'),
    ('see ckptd(8), *not* ptrace(2)', r'see \fBckptd\fP(8), \fInot\fP \fBptrace\fP(2)'),
    ('**one** [link](there.md)', r'\fBone\fP link'),
])
def test_texts(markdown: str, roff: str) -> None:
    assert man_page(f'# x(1)\n\n## NAME\n\n{markdown}\n', '1', DATE).splitlines()[-1] == roff


def test_a_sentence_begins_a_line_and_nothing_else_looks_like_an_end() -> None:
    text = 'One is short. A line that is long is broken, behind a dot if there is one, as here, e.g. here. Then.'
    assert filled(text) == [
        'One is short.',
        r'A line that is long is broken, behind a dot if there is one, as here, e.g.\&',
        'here.', 'Then.']


def test_tables_become_paragraphs_or_tables() -> None:
    page = man_page('# x(1)\n\n## A\n\n| a | type | |\n|---|---|---|\n| `b` | s | text |\n\n'
                    '| a | b |\n|---|---|\n| c | d |\n', '1', DATE)
    assert page.splitlines()[-11:] == ['.SH A', '.TP 4', r'\fBb\fP (type s)', 'text', '.PP', '.TS', 'lb lb', 'l l.',
                                       'a\tb', 'c\td', '.TE']


@pytest.mark.parametrize('markdown', ['# no section', '# x(1)\n\n> a quotation', '# x(1)\n\n![picture](x.png)',
                                      '# x(1)\n\n- one\n\n      code\n', '# x(1)\n\n# y(1)'])
def test_markup_that_the_writer_does_not_know_is_an_error(markdown: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownMarkup):
        man_page(markdown, '1', DATE)
    (tmp_path / 'x.1.md').write_text(markdown)
    done = build(tmp_path, tmp_path / 'x.1.md')
    assert done.returncode == 1
    assert done.stderr.startswith(f'{tmp_path}/x.1.md: ')
    assert not (tmp_path / 'man1').exists()
