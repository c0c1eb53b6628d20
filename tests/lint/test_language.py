# SPDX-License-Identifier: LGPL-2.1-or-later
"""The language of the sources: one class per name; docstrings begin with a noun or a verb; users are "they"."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / 'ckptd'
MODULES = sorted(PACKAGE.rglob('*.py'))
OTHERS = sorted(path for folder in ('dbus', 'units') for path in (ROOT / folder).rglob('*') if path.is_file())

# a docstring that begins with one of these has its subject in another sentence, or in the reader's memory
OPENING = re.compile(
    r'(of|who|whose|whom|whoever|what|whatever|the same|that|those|these|this|there|one that|one who|as|but|where|how'
    r'|why|he|she|it|its|they|their|them|we|our|us|you|your|i|which|everybody|somebody|someone|anybody|nobody)\b',
    re.IGNORECASE)
GENDER = re.compile(r'\b(he|him|his|himself|she|her|hers|herself)\b', re.IGNORECASE)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring of a module, class or function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of each string literal, docstrings and the fixed parts of f-strings included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in sorted(PACKAGE.rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f'{relative(path)}:{node.lineno}')
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize('path', MODULES, ids=relative)
def test_docstrings_begin_with_a_noun_or_a_verb(path: Path) -> None:
    tree = ast.parse(path.read_text())
    found = [f'{relative(path)}:{line}: {text.splitlines()[0]}' for line, text in docstrings(tree)
             if OPENING.match(text)]
    assert not found


@pytest.mark.parametrize('path', MODULES, ids=relative)
def test_users_are_they(path: Path) -> None:
    source = path.read_text()
    found = [f'{relative(path)}:{line}: {text}' for line, text in (*strings(ast.parse(source)), *comments(source))
             if GENDER.search(text)]
    assert not found


@pytest.mark.parametrize('path', OTHERS, ids=relative)
def test_users_are_they_outside_of_python(path: Path) -> None:
    found = [f'{relative(path)}:{number}: {line}' for number, line in enumerate(path.read_text().splitlines(), 1)
             if GENDER.search(line)]
    assert not found


@pytest.mark.parametrize(('text', 'wrong'), [
    ('Of a process.', True), ('The same for a restart.', True), ('What was dumped.', True),
    ('That which is left', True), ("Who's there", True), ('Freeze the tree.', False), ('Office hours.', False),
    ('The sample.', False), ('A futex waiter.', False), ('Whether the tree is frozen.', False),
])
def test_the_lint_finds_openings(text: str, wrong: bool) -> None:
    assert bool(OPENING.match(text)) == wrong
