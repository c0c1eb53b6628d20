# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual says what the program does: every member, option, error, command and key is in it, and nothing else."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from ckptd.bus import image, options, router, wire
from ckptd.bus.interfaces import documents
from ckptd.cli import arguments
from ckptd.config import KEYS
from ckptd.errors import CkptError, all_errors, errno_name
from tests.lint.test_layers import ORDER

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
SECTIONS = {
    'org.ckptd1.7.md': ('NAME', 'SYNOPSIS', 'DESCRIPTION', 'OBJECTS', 'METHODS', 'PROPERTIES', 'SIGNALS', 'OPTIONS',
                        'ERRORS', 'AUTHORIZATION', 'LIMITS', 'EXAMPLES', 'SEE ALSO'),
    'ckptd.8.md': ('NAME', 'SYNOPSIS', 'DESCRIPTION', 'OPTIONS', 'CONFIGURATION', 'SECURITY', 'ENVIRONMENT', 'FILES',
                   'EXIT STATUS', 'EXAMPLES', 'SEE ALSO'),
    'ckptd-restore-limits.7.md': ('NAME', 'SYNOPSIS', 'DESCRIPTION', 'REFUSED AT THE CHECKPOINT',
                                  'INTERRUPTED SYSTEM CALLS', 'CHANGED BY A RESTART', 'LOST WITHOUT A WARNING',
                                  'SEE ALSO'),
    'ckptd-objects.7.md': ('NAME', 'SYNOPSIS', 'DESCRIPTION', 'OPEN FILES', 'TASKS', 'MEMORY', 'SYSTEM V IPC',
                           'NAMESPACES', 'SEE ALSO'),
    'ckptctl.1.md': ('NAME', 'SYNOPSIS', 'DESCRIPTION', 'COMMANDS', 'OPTIONS', 'EXIT STATUS', 'EXAMPLES', 'SEE ALSO'),
}
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob('*.md'), *DOCS.glob('*.md')))
# which options each table is about
OPTIONS = {
    'Checkpoint, CheckpointProcess': options.CHECKPOINT, 'CheckpointSelf': options.SELF, 'Check': options.CHECK,
    'Freeze': options.FREEZING, 'Restore': options.RESTORE, 'CheckRestore': options.CHECK_RESTORE,
    'Inhibit': getattr(options, 'INHIBIT', ()),
}


def section(page: str, title: str, level: int = 2) -> str:
    """The text below a heading, up to the next of its level or above."""
    text = (DOCS / page).read_text() if page.endswith('.md') else page
    _, found, rest = f'\n{text}'.partition(f'\n{"#" * level} {title}\n')
    assert found, f'no section {title}'
    return re.split(rf'\n#{{1,{level}}} ', rest, maxsplit=1)[0]


def subsections(text: str) -> dict[str, str]:
    return {title: section(text, title, 3) for title in re.findall(r'^### (.*)$', text, re.MULTILINE)}


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without headings; backquotes and bold are taken off."""
    lines = [[cell.strip().replace('`', '') for cell in line.strip().strip('|').split('|')]
             for line in text.splitlines() if line.startswith('|')]
    rules = [number for number, cells in enumerate(lines) if set(''.join(cells)) <= {'-'}]
    return [cells for number, cells in enumerate(lines) if number not in rules and number + 1 not in rules]


def compare(documented: Iterable[str], found: Iterable[str]) -> None:
    """Both ways."""
    documented, found = set(documented), set(found)
    assert found - documented == set(), 'not in the manual'
    assert documented - found == set(), 'in the manual only'


def interfaces() -> Iterator[tuple[str, ElementTree.Element]]:
    """('Manager', its element) of the introspection data."""
    for document in documents().values():
        [interface] = ElementTree.fromstring(document)
        yield interface.attrib['name'].rpartition('.')[2], interface


def signature(element: ElementTree.Element) -> str:
    """'Checkpoint(s target, a{sv} options) -> o job'"""
    taken, given = (
        ', '.join(f'{arg.attrib["type"]} {arg.attrib["name"]}' for arg in element.findall('arg')
                  if (arg.get('direction') == 'out') == out) for out in (False, True))
    return f'{element.attrib["name"]}({taken})' + (f' -> {given}' if given else '')


@pytest.mark.parametrize('page', sorted(SECTIONS))
def test_pages_have_the_sections_of_manuals(page: str) -> None:
    text = (DOCS / page).read_text()
    assert tuple(re.findall(r'^## (.*)$', text, re.MULTILINE)) == SECTIONS[page]
    name = page.removesuffix('.md')
    assert text.startswith(f'# {name[:-2]}({name[-1]})\n')


@pytest.mark.parametrize('page', sorted(SECTIONS))
def test_lines_are_no_longer_than_others(page: str) -> None:
    """But for tables, which have a line a row."""
    assert [line for line in (DOCS / page).read_text().splitlines() if len(line) > 120 and line[0] != '|'] == []


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may end in, as GitHub and others make it."""
    titles = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r'^```.*?^```', '', (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        path, _, anchor = target.partition('#')
        there = ROOT / page if not path else (ROOT / page).parent / path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize('page', ['CONTRIBUTING.md', 'docs/architecture.md', 'docs/security.md'])
def test_paths_lead_somewhere(page: str) -> None:
    """A path in backquotes is below the checkout or below ckptd/. NAME stands for any name, of a file that will be."""
    text = (ROOT / page).read_text()
    paths = re.findall(r'`((?:[\w.]+/)+(?:\w+\.\w+)?)`', text)
    assert paths
    assert [path for path in paths if 'NAME' not in path and not (ROOT / path).exists()
            and not (ROOT / 'ckptd' / path).exists()] == []


def test_the_layers_are_those_of_the_imports() -> None:
    text = (DOCS / 'architecture.md').read_text()
    named = re.split(r',\s+', re.findall(r'the imports: ([^.]*)\.', text, re.DOTALL)[0].strip())
    places = [ORDER.index(layer) for layer in named]
    assert places == sorted(places)
    assert {path.name for path in (ROOT / 'ckptd').iterdir() if (path / '__init__.py').exists()} <= set(named)


def test_the_readme_can_be_read_in_a_few_minutes() -> None:
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 190


@pytest.mark.parametrize(('title', 'tag'), [('METHODS', 'method'), ('SIGNALS', 'signal')])
def test_members(title: str, tag: str) -> None:
    parts = subsections(section('org.ckptd1.7.md', title))
    documented = [f'{interface.removeprefix("org.ckptd1.")}.{head}' for interface, text in parts.items()
                  for head in re.findall(r'^#### (.*)$', text, re.MULTILINE)]
    assert len(documented) == len(set(documented))
    compare(documented, (f'{name}.{signature(element)}' for name, interface in interfaces()
                         for element in interface.findall(tag)))


def test_every_member_has_a_text() -> None:
    for title in ('METHODS', 'SIGNALS'):
        text = section('org.ckptd1.7.md', title)
        for body in re.split(r'^#### .*$', text, flags=re.MULTILINE)[1:]:
            assert re.sub(r'^#+ .*$', '', body, flags=re.MULTILINE).strip()


def test_properties() -> None:
    emits = 'org.freedesktop.DBus.Property.EmitsChangedSignal'
    parts = subsections(section('org.ckptd1.7.md', 'PROPERTIES'))
    documented = [f'{interface.removeprefix("org.ckptd1.")}.{name} {kind} {changes}'
                  for interface, text in parts.items() for name, kind, changes, *_ in rows(text)]
    found = []
    for name, interface in interfaces():
        for element in interface.findall('property'):
            notes = {note.get('name'): note.get('value') for note in element.findall('annotation')}
            changes = {'const': 'const', 'invalidates': 'invalidated'}.get(notes.get(emits) or '', 'yes')
            found.append(f'{name}.{element.attrib["name"]} {element.attrib["type"]} {changes}')
    compare(documented, found)


def test_options() -> None:
    parts = subsections(section('org.ckptd1.7.md', 'OPTIONS'))
    assert parts.keys() == OPTIONS.keys()
    compare((f'option {title}: {row[0]}' for title, text in parts.items() for row in rows(text)),
            (f'option {title}: {option.name}' for title, known in OPTIONS.items() for option in known))


def test_options_have_the_types_and_defaults_that_they_say() -> None:
    parts = subsections(section('org.ckptd1.7.md', 'OPTIONS'))
    for title, known in OPTIONS.items():
        by_name = {option.name: option for option in known}
        for name, kind, default, *_ in rows(parts[title]):
            if option := by_name.get(name):
                assert option.accepts(True) == (kind == 'b'), name
                assert option.accepts(1) == (kind == 't'), name
                assert option.accepts(default) or kind != 's' or ' ' in default or default == 'none', name


def test_methods_without_options_are_said_to_have_none() -> None:
    """Whoever gives options to one of these adds a table."""
    named = section('org.ckptd1.7.md', 'OPTIONS').rstrip().rsplit('\n', 1)[-1]
    taking = {element.attrib['name'] for _, interface in interfaces() for element in interface.findall('method')
              if any(arg.get('name') == 'options' for arg in element.findall('arg'))}
    tables = {name for title in OPTIONS for name in title.split(', ')}
    for method in taking - tables:
        assert re.search(rf'\b{method}\b', named), method


def test_formats() -> None:
    text = section('org.ckptd1.7.md', 'METHODS').partition('#### Export(')[2].partition('####')[0]
    compare((f'format {row[0]}' for row in rows(text)), (f'format {name}' for name in image.FORMATS))


def test_errors() -> None:
    documented = rows(section('org.ckptd1.7.md', 'ERRORS'))
    compare((f'{name} {errno}' for name, errno, *_ in documented),
            (f'{name} {errno_name(error.default_errno)}' for name, error in all_errors().items()))
    assert all(len(row) == 4 and all(row) for row in documented)


def test_actions_of_polkit() -> None:
    documented = [f'action {row[0]}' for row in rows(section('org.ckptd1.7.md', 'AUTHORIZATION'))]
    policies = [path for path in ROOT.glob('*/*.policy') if path.parent.name[0] != '.']
    compare(documented, (f'action {action.attrib["id"]}' for path in policies
                         for action in ElementTree.parse(path).getroot().findall('action')))


def test_limits() -> None:
    text = section('org.ckptd1.7.md', 'LIMITS')
    limits = {row[0]: row[1] for row in rows(text)}
    assert limits['calls of one connection at a time'] == str(router.MAX_CALLS)
    assert limits['file descriptors with one call'] == str(router.MAX_FDS)
    assert limits['arguments of one call'] == f'{wire.MAX_BODY >> 10} KiB'
    keys = {f'key {key}' for key in re.findall(r'\b([A-Z][A-Za-z]+)=', text)}
    assert keys <= {f'key {key}' for key in KEYS}


# ---------------------------------------------------------------- the programs

def long_options(text: str) -> set[str]:
    return set(re.findall(r'(?<![\w-])--[a-z]+(?:-[a-z]+)*', text))


def test_keys_of_the_configuration() -> None:
    compare((f'key {row[0].removesuffix("=")}' for row in rows(section('ckptd.8.md', 'CONFIGURATION'))),
            (f'key {key}' for key in KEYS))


def test_options_of_the_daemon() -> None:
    done = subprocess.run([sys.executable, '-m', 'ckptd.daemon', '--help'], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    documented = {row[0].split()[0] for row in rows(section('ckptd.8.md', 'OPTIONS'))}
    assert documented == long_options(done.stdout.partition('example:')[0])


def test_commands_of_ckptctl() -> None:
    assert {row[0].split()[0] for row in rows(section('ckptctl.1.md', 'COMMANDS'))} == set(arguments.COMMANDS)


def test_options_of_ckptctl() -> None:
    parser = arguments.build_parser()
    [commands] = [action for action in parser._actions if action.dest == 'command']
    assert isinstance(commands.choices, dict)
    found = {option for one in (parser, *commands.choices.values()) for action in one._actions
             for option in action.option_strings if option.startswith('--')}
    documented = {option for row in rows(section('ckptctl.1.md', 'OPTIONS')) for option in long_options(row[0])}
    assert documented == found


def test_exit_statuses() -> None:
    documented = {int(row[0]) for row in rows(section('ckptctl.1.md', 'EXIT STATUS'))}
    assert documented == {0} | {error.exit_status for error in all_errors().values()}
    assert CkptError.exit_status in documented
