# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turn manuals, docs/NAME.N.md, into man pages.

    python docs/manpage.py --release 0.1.0 --into /usr/share/man docs/ckptctl.1.md    writes man1/ckptctl.1 there

Markdown is parsed by markdown-it-py, which ckptd has by way of rich. The page uses the macros of man(7) that groff and
mandoc share:

| Markdown | man page |
|---|---|
| `# name(1)` | the title line; date: SOURCE_DATE_EPOCH, else that of the source |
| `##`, `###` | section, subsection |
| `####` | a bold line, and what follows is indented |
| table with an empty last heading | tagged paragraphs: the first cell, then the middle ones with their headings |
| any other table | laid out by tbl(1) |
| `code`, **bold** | bold |
| *emphasis* | italic |
| name(1) in the text | the name in bold |
"""

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode as Node

CHAPTERS = {'1': 'User Commands', '5': 'File Formats', '7': 'Miscellaneous', '8': 'System Management'}
WIDTH = 75              # of a line of text; mandoc -T lint asks for less than 80, with escapes
SENTENCE_END = re.compile(r'(?<=[^ .][.?!])(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z]|ckpt|\\f[BI])')
REFERENCE = re.compile(r'\b([\w.-]+)(\([1-8]\))')
TEXT_CELL = 24          # characters; the lines of a longer cell are filled
# what groff would replace by a typographic character, or take as a request
SPECIAL = str.maketrans({'\\': r'\e', "'": r'\(aq', '`': r'\(ga', '^': r'\(ha', '~': r'\(ti'})
SPECIAL_CODE = {**SPECIAL, ord('-'): r'\-'}


class UnknownMarkup(Exception):
    """A page has Markdown that the writer does not know. Add it there, or write the page without it."""


def guarded(line: str) -> str:
    """A line of text that does not begin as a request does."""
    return rf'\&{line}' if line[:1] in (".", "'") else line


def filled(text: str) -> list[str]:
    """Lines of text. A sentence begins a line; a line that ends inside of a sentence does not look like its end."""
    lines = []
    for sentence in SENTENCE_END.split(' '.join(text.split())):
        *inner, last = textwrap.wrap(sentence, WIDTH, break_long_words=False, break_on_hyphens=False) or ['']
        lines += [rf'{line}\&' if line[-1] in '.?!' else line for line in inner] + [last]
    return [guarded(line) for line in lines]


def plain(node: Node) -> str:
    """The text of a heading, without markup."""
    return ''.join(leaf.content for leaf in node.walk() if leaf.type in ('text', 'code_inline'))


def marked(node: Node) -> str:
    """Inline Markdown as text with font escapes."""
    match node.type:
        case 'text':
            return REFERENCE.sub(r'\\fB\1\\fP\2', node.content.translate(SPECIAL))
        case 'code_inline':
            return rf'\fB{node.content.translate(SPECIAL_CODE)}\fP'
        case 'softbreak':
            return ' '
        case 'inline' | 'link':
            return ''.join(map(marked, node.children))
        case 'strong':
            return rf'\fB{"".join(map(marked, node.children))}\fP'
        case 'em':
            return rf'\fI{"".join(map(marked, node.children))}\fP'
    raise UnknownMarkup(f'{node.type} in a text')


def inline(node: Node) -> str:
    """The text of a block that holds nothing else: a heading, a paragraph, a cell."""
    return ''.join(map(marked, node.children))


class Page:
    """Lines of a man page, block by block."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indented = False       # below a bold line
        self.begun = False          # something stands below the last heading, so the next paragraph needs a gap
        self.has_table = False

    def add(self, *lines: str) -> None:
        self.lines += lines

    def end_indent(self) -> None:
        if self.indented:
            self.add('.RE')
        self.indented = False

    def block(self, node: Node) -> None:
        known: dict[str, Callable[[Node], None]] = {
            'heading': self.heading, 'paragraph': self.paragraph, 'fence': self.code, 'code_block': self.code,
            'bullet_list': self.items, 'ordered_list': self.items, 'table': self.table}
        if node.type == 'html_block':       # a comment
            return
        if node.type not in known:
            raise UnknownMarkup(node.type)
        known[node.type](node)
        self.begun = node.type != 'heading'

    def heading(self, node: Node) -> None:
        self.end_indent()
        match node.tag:
            case 'h2':
                self.add(f'.SH {quoted(plain(node))}')
            case 'h3':
                self.add(f'.SS {quoted(plain(node))}')
            case 'h4':
                self.add(*['.PP'] * self.begun, guarded(rf'\fB{plain(node).translate(SPECIAL_CODE)}\fP'), '.RS 4')
                self.indented = True
            case _:
                raise UnknownMarkup(f'{node.tag} below the title')

    def paragraph(self, node: Node) -> None:
        if self.begun:
            self.add('.PP')
        self.add(*filled(inline(node)))

    def code(self, node: Node) -> None:
        if self.begun:
            self.add('.PP')
        lines = node.content.rstrip('\n').translate(SPECIAL_CODE).split('\n')
        self.add('.RS 4', '.EX', *(guarded(line) for line in lines), '.EE', '.RE')

    def items(self, node: Node) -> None:
        for number, item in enumerate(node.children, int(node.attrs.get('start', 1))):
            self.add(rf'.IP {number}. 4' if node.type == 'ordered_list' else r'.IP \(bu 2')
            first, *rest = item.children
            self.add(*filled(inline(first)))
            if rest:
                raise UnknownMarkup('more than a paragraph in an item of a list')

    def table(self, node: Node) -> None:
        headings, *rows = [list(row.children) for part in node.children for row in part.children]
        if plain(headings[-1]):
            self.has_table = True
            self.add(*['.PP'] * self.begun, *laid_out(headings, rows))
            return
        for tag, *middle, text in rows:
            notes = [f'{plain(heading)} {inline(cell)}' for heading, cell in zip(headings[1:-1], middle, strict=True)]
            label = inline(tag) if r'\fB' in inline(tag) else rf'\fB{inline(tag)}\fP'
            self.add('.TP 4', guarded(label + (f' ({", ".join(notes)})' if notes else '')), *filled(inline(text)))


def quoted(text: str) -> str:
    """An argument of a macro."""
    return f'"{text.translate(SPECIAL)}"' if ' ' in text else text.translate(SPECIAL)


def laid_out(headings: list[Node], rows: list[list[Node]]) -> Iterator[str]:
    """A table for tbl(1). Columns with long cells share what the others leave of the line."""
    columns = [[plain(row[number]) for row in rows] for number in range(len(headings))]
    wide = [any(len(cell) > TEXT_CELL and ' ' in cell for cell in column) for column in columns]
    yield '.TS'
    yield ' '.join('lb' for _ in headings)
    yield ' '.join('lx' if long else 'l' for long in wide) + '.'
    yield '\t'.join(inline(cell) for cell in headings)
    for row in rows:
        cells = ['T{\n' + '\n'.join(filled(inline(cell))) + '\nT}' if long else inline(cell)
                 for cell, long in zip(row, wide, strict=True)]
        yield '\t'.join(cells)
    yield '.TE'


def man_page(source: str, release: str, date: str) -> str:
    """The man page of a manual in Markdown."""
    title, *blocks = Node(MarkdownIt('commonmark').enable('table').parse(source)).children
    found = re.fullmatch(r'(.+)\((\d)\)', plain(title))
    if title.tag != 'h1' or not found:
        raise UnknownMarkup('the first line is not "# name(section)"')
    name, chapter = found.groups()
    page = Page()
    for block in blocks:
        page.block(block)
    page.end_indent()
    head = [f'.TH {quoted(name.upper())} {chapter} {date} "ckptd {release}" "{CHAPTERS[chapter]}"',
            '.nr HY 0', '.nh', '.ad l']
    return '\n'.join([r"""'\" t"""] * page.has_table + head + page.lines) + '\n'


def date_of(source: Path) -> str:
    """YYYY-MM-DD; SOURCE_DATE_EPOCH makes it the same in every build."""
    seconds = os.environ.get('SOURCE_DATE_EPOCH') or source.stat().st_mtime
    return time.strftime('%Y-%m-%d', time.gmtime(float(seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description='Write man pages below DIRECTORY/manN from NAME.N.md.')
    parser.add_argument('--release', required=True)
    parser.add_argument('--into', type=Path, required=True, metavar='DIRECTORY')
    parser.add_argument('sources', type=Path, nargs='+', metavar='NAME.N.md')
    options = parser.parse_args()
    for source in options.sources:
        target = options.into / f'man{source.stem[-1]}' / source.stem
        try:
            page = man_page(source.read_text(), options.release, date_of(source))
        except UnknownMarkup as error:
            sys.exit(f'{source}: {error}')
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page)
        target.chmod(0o644)


if __name__ == '__main__':
    main()
