# SPDX-License-Identifier: LGPL-2.1-or-later
"""All kinds: every subclass of NamespaceKind with a name, in a module of this package. A new kind is a new file, and
nothing else changes."""

import importlib
import os
import pkgutil
from collections.abc import Iterator

import ckptd.objects.namespaces
from ckptd.errors import Finding
from ckptd.image.reader import ImageReader
from ckptd.image.records import Namespace, Namespaces
from ckptd.kernel.task import boot_id, read_namespaces
from ckptd.objects.namespaces.base import FOR_CHILDREN, BirthNamespaces, NamespaceKind
from ckptd.objects.namespaces.other import OtherNamespace
from ckptd.remote.stub import Stub
from ckptd.tree import Task


def _discover() -> tuple[NamespaceKind, ...]:
    for module in pkgutil.iter_modules(ckptd.objects.namespaces.__path__):
        if module.name != 'registry':
            importlib.import_module(f'ckptd.objects.namespaces.{module.name}')
    found = [cls() for cls in NamespaceKind.__subclasses__() if cls.name]
    return tuple(sorted(found, key=lambda one: (not one.is_first, one.name)))


_KINDS = _discover()
_BY_NAME = {kind.name: kind for kind in _KINDS}


# ---------------------------------------------------------------- dump

def findings(task: Task, home: dict[str, int]) -> list[Finding]:
    """Refuse any namespace other than the root's, including those for future children (pid_for_children). home: inodes
    of the root's, by name."""
    own = read_namespaces(task.tgid, task.tid)
    for kind in _KINDS:
        kind.complete(own)
    other = sorted(name for name, inode in own.items() if inode != home.get(name.removesuffix(FOR_CHILDREN), inode))
    return [Finding(task.tid, task.comm, f'namespace {name}', 'EPERM',
                    f'is in another {name} namespace than the root of the tree',
                    'checkpoint the tree below the task that made the namespace') for name in other]


def record(root: Task) -> Namespaces:
    """Make the record of the namespaces of a tree."""
    own = {*read_namespaces(os.getpid()).items(), *_of_the_machine()}
    return Namespaces(tuple(Namespace(name, inode, int((name, inode) in own))
                            for name, inode in sorted(read_namespaces(root.tid).items())))


def _of_the_machine() -> list[tuple[str, int]]:
    """Return the namespaces of the first process, because a service that dumps has a mount namespace of its own."""
    try:
        return list(read_namespaces(1).items())
    except (PermissionError, ProcessLookupError):
        return []


# ---------------------------------------------------------------- restart

def restart_findings(reader: ImageReader, vpid: int, birth: BirthNamespaces) -> Iterator[Finding]:
    """Yield the reasons why namespaces of an image cannot be had again. vpid: of the root."""
    # an inode means a namespace of the same boot only
    ours = read_namespaces(os.getpid()) if reader.manifest.boot_id == boot_id() else {}
    for kept in reader.every(Namespaces):
        for one in kept.namespaces:
            name = one.name.removesuffix(FOR_CHILDREN)
            kind = _BY_NAME.get(name) or OtherNamespace(name)
            yield from kind.restart_findings(one, vpid, birth, is_ours=ours.get(one.name) == one.inode)


def enter(birth: BirthNamespaces, bootstrap: Stub) -> list[Finding]:
    """Let the first stub make the namespaces that a process can make for itself. Return warnings about those that are
    not available and not required."""
    return [row for kind in _KINDS for row in kind.enter(birth, bootstrap)]
