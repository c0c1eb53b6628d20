# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mapped file."""

import os
import stat
from pathlib import Path

from ckptd.errors import Finding
from ckptd.image.records import FILE_PRIVATE, FILE_SHARED, Backing
from ckptd.kernel.maps import DELETED, Mapping, map_file, stat_mapped
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.shmem import is_object_of_shm_mount, is_of_shm_mount
from ckptd.objects.files.base import finding
from ckptd.objects.files.linked import DeletedFile, link_findings
from ckptd.objects.mappings.base import RELEASE, Links, MappingKind, MappingTables, PageCopier, View

_DEV_ZERO = os.makedev(1, 5)
# Bytes; the content of a file that is mapped for writing is kept up to this size although it has a name. One example is
# Java's statistics, /tmp/hsperfdata_USER/PID: once their process is dead, the next java or a boot removes them.
KEPT_SIZE = 1 << 20


class FileMapping(MappingKind, numbers=[FILE_PRIVATE, FILE_SHARED]):
    """A mapping of a file with a name, or of one that has lost its name."""

    def __init__(self, tables: MappingTables) -> None:
        super().__init__(tables)
        self._checked: dict[tuple[int, int, int, str], Finding | None] = {}
        self._backings: list[Backing] = []
        self._kept: dict[int, View] = {}        # index into _backings, a view to read the content by
        self._ids: dict[tuple[int, int, int, str], int] = {}

    def matches(self, mapping: Mapping) -> bool:
        return not mapping.anonymous and not is_object_of_shm_mount(mapping)

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        """Check a file once, because a thousand processes may map the same libraries. A warning appears once in the
        tree."""
        if not mapping.path.startswith('/') or is_of_shm_mount(mapping):
            return None
        key = (mapping.major, mapping.minor, mapping.inode, mapping.path)
        if key in self._checked:
            return self._checked[key]
        found = _check_file(tid, mapping)
        self._checked[key] = found if found and found.severity == 'refusal' else None
        return found

    def object_of(self, view: View) -> tuple[int, int]:
        mapping = view.mapping
        key = (mapping.major, mapping.minor, mapping.inode, mapping.path)
        if key not in self._ids:
            record = _describe(len(self._backings) + 1, view)
            self._ids[key] = record.backing_id
            self._backings.append(record)
        index = self._ids[key] - 1
        if _goes_along(self._backings[index], mapping):
            self._kept.setdefault(index, view)
        return FILE_SHARED if mapping.shared else FILE_PRIVATE, self._ids[key]

    def copy(self, copier: PageCopier, links: Links) -> None:
        for index, view in self._kept.items():
            self._backings[index] = _with_content(self._backings[index], view, copier, links)

    def records(self) -> list[Backing]:
        return self._backings


# ---------------------------------------------------------------- findings

def _check_file(tid: int, mapping: Mapping) -> Finding | None:
    mapped = stat_mapped(tid, mapping)
    named = lstat_of_task(tid, mapping.file_path)
    is_there = named is not None and named.st_ino == (mapped.st_ino if mapped else mapping.inode)
    of = mapped or (named if is_there else None)
    if of and stat.S_ISCHR(of.st_mode):
        return None if of.st_rdev == _DEV_ZERO else _device('character', mapping, of)
    if of and stat.S_ISBLK(of.st_mode):
        return _device('block', mapping, of)
    if is_there:
        return None
    if mapped is None and mapping.deleted:
        return finding('EPERM', f'{mapping.file_path} is deleted and its content cannot be read',
                       'run ckptd as root (it needs CAP_CHECKPOINT_RESTORE for /proc/PID/map_files)')
    if mapping.deleted and mapped and mapped.st_nlink:
        file = DeletedFile(tid, tid, mapping.file_path, mapped, map_file(tid, mapping))
        return next(iter(link_findings(file)), None)
    if mapping.deleted:
        return None         # its content goes into the image
    return finding('ENOENT', f'{mapping.path} is another file now, or hidden by a mount',
                   'a restart maps files by path: remove the mount or put the file back', 'warning')


def _device(sort: str, mapping: Mapping, of: os.stat_result) -> Finding:
    number = f'{os.major(of.st_rdev)}:{os.minor(of.st_rdev)}'
    return finding('EOPNOTSUPP', f'memory of the {sort} device {number}: {mapping.path}', RELEASE)


# ---------------------------------------------------------------- dump

def _describe(number: int, view: View) -> Backing:
    mapping = view.mapping
    mapped = stat_mapped(view.tid, mapping) if mapping.size else os.stat(view.magic_link)  # noqa: PTH116
    # a name may itself end in " (deleted)": only the inode is certain
    for path in (mapping.path, mapping.file_path):
        named = lstat_of_task(view.tid, path)
        if named is not None and (os.path.samestat(named, mapped) if mapped else named.st_ino == mapping.inode):
            # st_dev and not the numbers in maps: on btrfs and overlayfs they differ, and a restart compares with
            # stat(2)
            return Backing(number, path, named.st_dev, named.st_ino, named.st_size, named.st_mtime_ns, named.st_mode, 0,
                           ())
    if mapped is None and not mapping.deleted:
        # we can neither see nor open it, so use the kernel's numbers, by which a restart identifies it
        return Backing(number, mapping.path, os.makedev(mapping.major, mapping.minor), mapping.inode, 0, 0, 0, 0, ())
    return Backing(number, mapping.file_path, 0, mapping.inode, 0, 0, 0, 1, ())


def _goes_along(backing: Backing, mapping: Mapping) -> bool:
    """Whether to keep the content: of a deleted file, or a small one that is written through the mapping, since it may
    not exist later."""
    written = mapping.shared and mapping.write and stat.S_ISREG(backing.mode) and backing.size <= KEPT_SIZE
    return bool(backing.deleted) or written


def _with_content(backing: Backing, view: View, copier: PageCopier, links: Links) -> Backing:
    """Return the record of a file with its content. A file with a name has none if the mapping cannot be opened:
    proc_pid_map_files(5) requires CAP_CHECKPOINT_RESTORE."""
    try:
        fd = os.open(view.magic_link, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if backing.deleted:
            raise
        return backing
    try:
        at = os.fstat(fd)
        content = copier.copy_whole(fd, at.st_size)
        # `deleted` is set as well for a file that is only out of our reach by its path
        is_linked = backing.deleted and at.st_nlink and str(Path(f'/proc/self/fd/{fd}').readlink()).endswith(DELETED)
        link = links.link(DeletedFile(view.tid, view.tid, backing.path, at, view.magic_link), fd) if is_linked else ''
    finally:
        os.close(fd)
    return Backing(backing.backing_id, backing.path, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_mode,
                   backing.deleted, (content,), link)
