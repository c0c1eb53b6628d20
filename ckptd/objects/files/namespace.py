# SPDX-License-Identifier: LGPL-2.1-or-later
"""A namespace opened as a file: /proc/PID/ns/* (namespaces(7)).

That of the tree is opened again by a process of the tree: the restored tree may be in another one. That of the machine,
in which the tree is not, is opened by process 1. No other one can be had again.
"""

import os
import re

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.grammar import U8, U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.nsfs import machine_namespaces
from ckptd.kernel.task import read_namespaces
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.support import Support

_LINK = re.compile(r'(cgroup|ipc|mnt|net|pid|time|user|uts):\[(\d+)\]')
_OWNERS = {1: 'the tree', 2: 'the machine'}
_TREE, _MACHINE = _OWNERS
_FIRST = 1              # process 1


@layout
class NamespaceFile(Struct):
    """An open namespace."""
    name: str       # of the link in /proc/PID/ns
    owner: U8       # whose it is: 1 the tree's, 2 that of process 1
    vpid: U32       # of a process of the tree


class NamespaceFileKind(Kind[NamespaceFile], tag='namespace'):
    support = Support('namespaces opened as files', dumped='name',
                      refused='those of processes outside of the tree, but for process 1',
                      user='those of process 1 are refused')

    def matches(self, file: OpenFile) -> bool:
        return not file.is_path and _LINK.fullmatch(file.link) is not None

    def findings(self, file: OpenFile) -> list[Finding]:
        if self._owner(file):
            return []
        return [finding('EOPNOTSUPP', f'{file.link} is a namespace outside of the tree',
                        'close it before the checkpoint, or checkpoint a tree that is in it')]

    def dump(self, file: OpenFile, content: Content) -> NamespaceFile:
        return NamespaceFile(_parse(file)[0], self._owner(file), content.vpid(self._task(file)))

    def _owner(self, file: OpenFile) -> int:
        """Return whose namespace it is, as in NamespaceFile; 0 for neither. While its file is open, no other has its
        inode."""
        name, inode = _parse(file)
        if read_namespaces(self._task(file)).get(name) == inode:
            return _TREE
        machine = machine_namespaces().get(name)
        return _MACHINE if machine is not None and machine.inode == inode else 0

    def _task(self, file: OpenFile) -> int:
        """Return a process of the tree. The holder of a file in flight is ourselves."""
        tree = self._tables.table_owners
        return file.pid if file.pid in tree or not tree else tree[0]

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: NamespaceFile, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if not _LINK.fullmatch(f'{record.name}:[0]') or record.owner not in _OWNERS:
            return [finding('EBADMSG', f'{saved.link} is no namespace that a file can be of', 'the image is damaged')]
        if record.owner == _MACHINE and not _may_open(record, lookup):
            return [finding('EACCES', f'{saved.link} was the namespace of process 1, which may not be opened',
                            'restore it as root')]
        return []

    def late(self, record: NamespaceFile, saved: SavedFile) -> bool:
        return record.owner == _TREE

    def create(self, record: NamespaceFile, saved: SavedFile, ctx: RestoreContext) -> int:
        if record.owner == _TREE:
            if not ctx.pid(record.vpid):
                raise ImageDamaged(f'{saved.link} is of process {record.vpid}, which the image does not have')
            return ctx.open_by(record.vpid, f'/proc/self/ns/{record.name}', os.O_RDONLY)
        return ctx.open(_path(record), os.O_RDONLY)


def _parse(file: OpenFile) -> tuple[str, int]:
    name, inode = _LINK.fullmatch(file.link).groups()  # type: ignore[union-attr]
    return name, int(inode)


def _path(record: NamespaceFile) -> str:
    return f'/proc/{_FIRST}/ns/{record.name}'


def _may_open(record: NamespaceFile, lookup: FileLookup) -> bool:
    try:
        os.close(lookup.open(_path(record), os.O_RDONLY))
    except OSError:
        return False
    return True
