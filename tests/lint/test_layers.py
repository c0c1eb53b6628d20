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

# a layer may import from the layers before it, and from itself
ORDER = ['errors', 'faults', 'fileio', 'flock', 'logs', 'places', 'notify', 'external', 'config', 'tree', 'target',
         'sysv', 'kernel',
         'image', 'journal', 'remote', 'objects', 'inspect', 'freezer', 'protocol', 'operation',
         'dump', 'restore', 'worker', 'jobs', 'bus', 'client', 'cli', 'daemon']
# finer than the order. These layers know nothing of the others, whatever stands before them
ONLY_LAYERS = {
    'faults': set(), 'fileio': set(), 'flock': set(), 'logs': set(), 'places': {'errors'}, 'notify': {'errors'},
    'external': {'errors'}, 'config': {'errors', 'external'}, 'tree': {'errors'}, 'target': {'errors'},
    'sysv': {'errors'},
    'kernel': {'errors', 'tree'},               # no policy
    'image': {'errors', 'tree', 'fileio', 'flock'},     # no kernel
    'journal': {'errors', 'tree', 'kernel', 'fileio', 'flock'},
    'client': {'errors', 'kernel', 'bus'},
    'cli': {'errors', 'external', 'sysv', 'target', 'image', 'bus', 'client', 'notify', 'kernel'},
}
# the daemon never touches a tracee: it and its layers know of a worker no more than how to talk to it
WORKERS = ['remote', 'objects', 'protocol', 'operation', 'dump', 'restore',
           'worker']
NOT = {layer: {*WORKERS, 'inspect'} for layer in ('jobs', 'bus', 'daemon')}
DAEMONS = {'ckptd.protocol.messages', 'ckptd.protocol.requests'}
# finer than a layer: what of another layer may be used
ONLY = {
    # doctor is a plain function of the kernel layer that needs no daemon
    'cli': {'bus': {'ckptd.bus.names', 'ckptd.bus.wire', 'ckptd.bus.client', 'ckptd.bus.message'},
            'kernel': {'ckptd.kernel.probe', 'ckptd.kernel.prctl', 'ckptd.kernel.fork'}},
    'jobs': {'protocol': DAEMONS, 'inspect': {'ckptd.inspect.scan'}},
    'bus': {'protocol': DAEMONS},
    'daemon': {'protocol': DAEMONS},
}


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


def may_import(layer: str, name: str) -> bool:
    """Whether a module of this layer may import module `name`."""
    other = layer_of(name)
    if other in (layer, '') or name in ONLY.get(layer, {}).get(other, ()):
        return True
    if other in ONLY.get(layer, {}) or other in NOT.get(layer, ()):
        return False
    before = set(ORDER[:ORDER.index(layer)])
    return other in before & ONLY_LAYERS.get(layer, before)


def breaches(path: Path) -> list[str]:
    here = layer_of(module_name(path))
    return [f'{path.relative_to(ROOT)}:{line} imports {name}' for line, name in imports_of(path)
            if not may_import(here, name)]


@pytest.mark.parametrize('path', [path for path in MODULES if layer_of(module_name(path))], ids=module_name)
def test_imports_come_from_layers_above(path: Path) -> None:
    assert layer_of(module_name(path)) in ORDER, f'{path} belongs to no layer'
    assert not breaches(path)


def test_the_package_itself_imports_nothing() -> None:
    assert not imports_of(PACKAGE / '__init__.py')


# modules of a package of objects that are not an object
COMMON = {
    'files': {'__init__', 'base', 'content', 'deleted', 'linked', 'open_file', 'options', 'other_names', 'registry',
              'rollback', 'sound', 'tables', 'unsupported', 'watched'},
    'attributes': {'__init__', 'allowed', 'base', 'registry'},
    'mappings': {'__init__', 'base', 'means', 'registry'},
    'ipc': {'__init__', 'base', 'registry'},
    'namespaces': {'__init__', 'base', 'birth', 'registry'},
}


@pytest.mark.parametrize('package', sorted(COMMON))
def test_no_object_is_named_outside_its_package(package: str) -> None:
    common, folder = COMMON[package], PACKAGE / 'objects' / package
    kinds = {module_name(path) for path in folder.rglob('*.py') if path.parent != folder or path.stem not in common}
    named = [f'{path.relative_to(ROOT)}:{line} imports {name}' for path in MODULES if folder not in path.parents
             for line, name in imports_of(path) if name in kinds]
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
