# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rows of a dry run: every one says what to do about it; and what of the checks needs no machine."""

import ast
from pathlib import Path

import pytest

from ckptd.errors import Busy, CkptError, Finding, ImageDamaged, PermissionDenied, Refused
from ckptd.kernel.creds import capability_names
from ckptd.objects import attributes, mappings, namespaces
from ckptd.objects.attributes.scheduling import ranges_of
from ckptd.restore import checks
from ckptd.restore.checks.capacity import parse_meminfo
from ckptd.restore.checks.context import about, once

# checks that ask the files of a package of objects; context.py makes the rows that they have in common
OF_OBJECTS = {attributes: 'attributes', mappings: 'objects', namespaces: 'surroundings'}
MODULES = [('objects' if path.stem == 'context' else path.stem, path)
           for path in sorted(Path(checks.__file__).parent.glob('*.py'))]
MODULES += [(name, path) for package, name in OF_OBJECTS.items()
            for path in sorted(Path(str(package.__file__)).parent.glob('*.py'))]
ROWS = [(name, call) for name, path in MODULES for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == 'about']


@pytest.mark.parametrize('call', [call for _, call in ROWS], ids=[f'{name}-{call.lineno}' for name, call in ROWS])
def test_every_row_has_a_hint(call: ast.Call) -> None:
    """The arguments are vpid, resource, errno, reason, hint."""
    hint = call.args[4]
    assert not isinstance(hint, ast.Constant) or len(hint.value) > 10


def test_there_are_rows_of_every_check() -> None:
    assert {name for name, _ in ROWS} == {check.__module__.rpartition('.')[2] for check in checks.CHECKS}


def row(errno: str) -> Finding:
    return Finding(7, 'sh', 'fd 1', errno, 'why', 'what to do')


@pytest.mark.parametrize(('errnos', 'error'), [
    (['EEXIST', 'EBUSY'], Busy), (['EEXIST', 'ENOENT'], Refused), (['ENOENT', 'EPERM'], PermissionDenied),
    (['ENOENT', 'EBADMSG', 'EPERM'], ImageDamaged), (['ESTALE'], Refused)])
def test_the_error_of_a_restart(errnos: list[str], error: type[CkptError]) -> None:
    """Only where nothing but something in use is in the way, it is worth trying again."""
    rows = [row(errno) for errno in errnos]
    found = Refused.restart(rows, 'plan')
    assert type(found) is error
    assert (found.refusals, found.phase, found.hint) == (tuple(rows), 'plan', 'what to do')


def test_names() -> None:
    assert capability_names(1 << 24 | 1) == 'CAP_CHOWN, CAP_SYS_RESOURCE'
    assert capability_names(1 << 63) == 'capability 63'
    assert ranges_of([2, 3, 4, 7, 9, 10]) == '2-4, 7, 9-10'


def test_meminfo() -> None:
    assert parse_meminfo(b'MemAvailable:  12 kB\nHugePages_Total:  3\n') == {'MemAvailable': 12288,
                                                                          'HugePages_Total': 3}


def test_the_same_of_two_places_is_said_once() -> None:
    found = once(about(1, f'fd {fd}', 'ENOENT', f'{file} is missing', 'put it back')
                 for fd, file in ((1, 'x'), (2, 'x'), (3, 'y')))
    assert [one.resource for one in found] == ['fd 1', 'fd 3']
