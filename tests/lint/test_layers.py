# SPDX-License-Identifier: LGPL-2.1-or-later
"""The layers of docs/architecture.md, read from the imports, and the sizes that keep modules readable."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / 'ckptd'
MODULES = sorted(PACKAGE.rglob('*.py'))
TESTS = sorted(path for path in (ROOT / 'tests').rglob('*.py') if 'build' not in path.parts)

MAX_MODULE = 350
MAX_FUNCTION = 60
# a table of layouts, in one file because it is one format
LONG_TABLES = {'ckptd.image.records': 450}

# layer -> the layers it may import from, besides itself and ckptd/__init__.py
LAYERS: dict[str, set[str]] = {
    'errors': set(),
    'flock': set(),
    'tree': {'errors'},
    'kernel': {'errors', 'tree'},
    'image': {'errors', 'tree', 'flock'},
    'kinds': {'errors', 'tree', 'kernel', 'image'},
    'scan': {'errors', 'tree', 'kernel', 'image', 'kinds'},
    'picture': {'errors', 'tree', 'kernel', 'image', 'kinds'},
    'checks': {'errors', 'tree', 'kernel', 'image', 'kinds', 'scan', 'picture'},
    'freezer': {'errors', 'tree', 'kernel', 'image', 'kinds', 'scan', 'journal'},
    'journal': {'errors', 'tree', 'kernel', 'flock'},
    'engine': {'errors', 'tree', 'kernel', 'image', 'kinds', 'scan', 'picture', 'checks', 'freezer', 'journal'},
    'jobs': {'errors', 'tree', 'kernel', 'image', 'scan', 'freezer', 'journal', 'engine', 'config', 'notify', 'flock'},
    'bus': {'errors', 'tree', 'kernel', 'image', 'engine', 'jobs', 'config', 'notify'},
    'daemon': {'errors', 'tree', 'kernel', 'image', 'freezer', 'journal', 'engine', 'jobs', 'bus', 'config', 'notify',
               'places', 'logs'},
    'config': {'errors'},
    'notify': {'errors'},
    'logs': set(),
    'places': {'errors'},
    'cli': {'errors', 'image', 'bus', 'client', 'notify'},
    'client': {'errors', 'kernel', 'bus'},
}
# finer than a layer: what of another layer may be used
ONLY = {
    # doctor is a plain function of the kernel layer that needs no daemon
    'cli': {'ckptd.bus.names', 'ckptd.bus.wire', 'ckptd.bus.client', 'ckptd.bus.message', 'ckptd.kernel.probe'},
    'jobs': {'ckptd.engine.messages'},
    'bus': {'ckptd.engine.messages'},
    'daemon': {'ckptd.engine.messages'},
}
RESTRICTED = {'cli': {'bus', 'kernel'}, 'jobs': {'engine'}, 'bus': {'engine'}, 'daemon': {'engine'}}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def layer_of(module: str) -> str:
    """'kernel' for ckptd.kernel.arch.x86_64, '' for the package itself."""
    return module.split('.')[1] if '.' in module else ''


def module_name(path: Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


@functools.cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module) of each import of ckptd, also inside functions; `from ckptd import tree` counts as ckptd.tree."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno}: relative import'
            base = node.module or ''
            for alias in node.names:
                inner = (ROOT / base.replace('.', '/') / alias.name)
                is_module = inner.is_dir() or inner.with_suffix('.py').exists()
                found.append((node.lineno, f'{base}.{alias.name}' if is_module else base))
    return [(line, name) for line, name in found if name.split('.')[0] == 'ckptd']


def breaches(path: Path) -> list[str]:
    here = layer_of(module_name(path))
    allowed = {layer for layer in LAYERS[here] if layer not in RESTRICTED.get(here, ())} | {here, ''}
    return [f'{path.relative_to(ROOT)}:{line} imports {name}' for line, name in imports_of(path)
            if layer_of(name) not in allowed and name not in ONLY.get(here, ())]


@pytest.mark.parametrize('path', [path for path in MODULES if layer_of(module_name(path))], ids=module_name)
def test_imports_come_from_layers_above(path: Path) -> None:
    assert layer_of(module_name(path)) in LAYERS, f'{path} belongs to no layer'
    assert not breaches(path)


def test_the_package_itself_imports_nothing() -> None:
    assert not imports_of(PACKAGE / '__init__.py')


def test_no_kind_is_named_outside_kinds() -> None:
    common = {'__init__', 'base', 'content', 'deleted', 'registry', 'rollback', 'sound', 'unsupported'}
    kinds = {path.stem for path in (PACKAGE / 'kinds').glob('*.py')} - common
    named = [f'{path.relative_to(ROOT)}:{line} imports {name}' for path in MODULES if path.parent.name != 'kinds'
             for line, name in imports_of(path) if name.startswith('ckptd.kinds.') and name.split('.')[2] in kinds]
    assert not named


def test_only_the_queue_makes_tasks() -> None:
    """One owner of asyncio tasks per process: the queue; the bus router serves calls, which are its own."""
    others = [path for path in MODULES if layer_of(module_name(path)) not in ('jobs', 'bus', 'cli')]
    makers = [path.name for path in others for node in ast.walk(tree_of(path))
              if isinstance(node, ast.Attribute) and node.attr in ('create_task', 'ensure_future')]
    assert not makers


def test_kernel_layer_neither_logs_nor_awaits() -> None:
    for path in (PACKAGE / 'kernel').rglob('*.py'):
        names = {alias.name.split('.')[0] for node in ast.walk(tree_of(path))
                 if isinstance(node, ast.Import) for alias in node.names}
        assert not names & {'logging', 'asyncio'}, path


@pytest.mark.parametrize('path', MODULES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_licence_line_comes_first(path: Path) -> None:
    assert path.read_text().startswith('# SPDX-License-Identifier: LGPL-2.1-or-later\n')


@pytest.mark.parametrize('path', MODULES, ids=module_name)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= LONG_TABLES.get(module_name(path), MAX_MODULE), f'{path} has {lines} lines'
    functions = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in ast.walk(tree_of(path))
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [(name, size) for name, size in functions if size > MAX_FUNCTION]
