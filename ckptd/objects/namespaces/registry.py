# SPDX-License-Identifier: LGPL-2.1-or-later
"""All kinds: every subclass of NamespaceKind with a name, in a module of this package. A new kind is a new file, and
nothing else changes."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from ckptd.errors import Finding
from ckptd.image.reader import ImageReader
from ckptd.image.records import Namespace, NamespaceHolder, Namespaces
from ckptd.kernel.ancestry import is_below
from ckptd.kernel.nsfs import NamespaceId, machine_namespaces, read_namespace_ids
from ckptd.kernel.pidfd import held
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import boot_id, pids, read_namespaces
from ckptd.objects import namespaces
from ckptd.objects.modules import modules_of
from ckptd.objects.namespaces.base import FOR_CHILDREN, BirthNamespaces, NamespaceKind
from ckptd.objects.namespaces.other import OtherNamespace
from ckptd.objects.namespaces.pid import may_choose_pids
from ckptd.remote.stub import Stub
from ckptd.tree import Task


def _discover() -> tuple[NamespaceKind, ...]:
    modules_of(namespaces)
    found = [cls() for cls in NamespaceKind.__subclasses__() if cls.name]
    return tuple(sorted(found, key=lambda one: (not one.is_first, one.name)))


_KINDS = _discover()
_BY_NAME = {kind.name: kind for kind in _KINDS}
_MACHINES, _DUMPERS = 1, 2      # Namespace.own
_MOST_HOLDERS = 4


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
    kept, ids = _describe(root)
    return Namespaces(kept, ids, () if all(ids) else _holders(root, [one for one in kept if one.own != _MACHINES]))


def unrestorable(root: Task) -> list[Finding]:
    """List the namespaces of a tree that are there only while some process is in them. No restart makes them."""
    birth = BirthNamespaces(user=not may_choose_pids(), pid=True, clocks=None)
    return [Finding(root.tid, root.comm, f'namespace {one.name}', 'EOPNOTSUPP',
                    f'is in a {one.name} namespace of its own, which a restart does not make',
                    'keep the namespace alive by a process outside of the tree, and restore from inside it '
                    '(nsenter); after --kill the tree would be lost', 'unrestorable')
            for one in _describe(root)[0] if _is_lost(one, birth)]


def _is_lost(one: Namespace, birth: BirthNamespaces) -> bool:
    kind = _kind_of(one)
    return kind.is_lost(one, birth) and not kind.is_only_shown


def _describe(root: Task) -> tuple[tuple[Namespace, ...], tuple[int, ...]]:
    """Return the namespaces of a task, and their ids. The machine's own are those of its first process, because a
    service that dumps has a mount namespace of its own."""
    machine, ours = machine_namespaces(), read_namespace_ids(os.getpid())
    found = sorted(read_namespace_ids(root.tid).items())
    whose = {**dict.fromkeys(ours.items(), _DUMPERS), **dict.fromkeys(machine.items(), _MACHINES)}
    kept = [Namespace(name, one.inode, whose.get((name, one), 0)) for name, one in found]
    return tuple(kept), tuple(one.id for _, one in found)


def _holders(root: Task, kept: Sequence[Namespace]) -> tuple[NamespaceHolder, ...]:
    """Find processes that are in all of these namespaces, and not below `root`."""
    found: list[NamespaceHolder] = []
    for pid in pids() if kept else ():
        with suppress(OSError):
            links, start_time = read_namespaces(pid), read_stat(pid).start_time
            if all(links.get(one.name) == one.inode for one in kept) and not is_below(pid, root.tid, root.start_time):
                found.append(NamespaceHolder(pid, start_time))
        if len(found) == _MOST_HOLDERS:
            break
    return tuple(found)


# ---------------------------------------------------------------- restart

def restart_findings(reader: ImageReader, vpid: int, birth: BirthNamespaces) -> Iterator[Finding]:
    """Yield the reasons why namespaces of an image cannot be had again. vpid: of the root."""
    ours = read_namespace_ids(os.getpid())
    for kept in reader.every(Namespaces):
        ids = dict(zip((one.name for one in kept.namespaces), kept.ids, strict=False))
        for one in kept.namespaces:
            is_ours = False
            # ids, inodes and processes mean the same in the same boot only
            if reader.manifest.boot_id == boot_id():
                one, is_ours = _look_again(one, ids.get(one.name, 0), kept.holders, ours)
            yield from _kind_of(one).restart_findings(one, vpid, birth, is_ours=is_ours)


def _look_again(one: Namespace, number: int, holders: Iterable[NamespaceHolder], ours: Mapping[str, NamespaceId]
                ) -> tuple[Namespace, bool]:
    """Return the namespace as it is to us, who may be elsewhere than the process that dumped it, and whether we are in
    it. number: its id, 0 if unknown."""
    here = ours.get(one.name, NamespaceId(0, 0))
    if number and here.id:
        is_ours = number == here.id
    else:
        # An inode number belongs to the next namespace as soon as its own is gone. It was not gone if a process lived
        # on in it.
        is_ours = here.inode == one.inode and any(_holds(holder, one) for holder in holders)
    return replace(one, own=int(one.own == _MACHINES or (one.own and is_ours))), is_ours


def _holds(holder: NamespaceHolder, one: Namespace) -> bool:
    with suppress(OSError), held(holder.pid, holder.start_time):
        return read_namespaces(holder.pid).get(one.name) == one.inode
    return False


def _kind_of(one: Namespace) -> NamespaceKind:
    name = one.name.removesuffix(FOR_CHILDREN)
    return _BY_NAME.get(name) or OtherNamespace(name)


def enter(birth: BirthNamespaces, bootstrap: Stub) -> list[Finding]:
    """Let the first stub make the namespaces that a process can make for itself. Return warnings about those that are
    not available and not required."""
    return [row for kind in _KINDS for row in kind.enter(birth, bootstrap)]
