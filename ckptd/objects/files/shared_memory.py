# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shared anonymous memory that was opened through /proc/PID/map_files. objects/mappings/shared_memory.py has its
mappings and its content."""

import stat

from ckptd.errors import Finding
from ckptd.image.grammar import U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.shmem import SHARED_ANONYMOUS, on_shm_mount
from ckptd.objects.files.base import Content, Kind, OpenFile, RestoreContext, open_again
from ckptd.objects.files.content import unread_findings
from ckptd.objects.files.locks import Lock, read_locks, restore_locks
from ckptd.objects.support import Support


@layout
class SharedMemoryFile(Struct):
    """An open file of such memory. shm_id: the SharedMemory record that has the content."""
    shm_id: U32
    locks: tuple[Lock, ...]


class SharedMemoryFileKind(Kind[SharedMemoryFile], tag='shmem'):
    support = Support('shared anonymous memory opened through /proc/PID/map_files')

    def matches(self, file: OpenFile) -> bool:
        return (stat.S_ISREG(file.stat.st_mode) and not file.is_path and on_shm_mount(file.stat)
                and file.link in SHARED_ANONYMOUS)

    def findings(self, file: OpenFile) -> list[Finding]:
        return unread_findings(file)

    def dump(self, file: OpenFile, content: Content) -> SharedMemoryFile:
        return SharedMemoryFile(content.shared_memory(file), read_locks(file))

    def create(self, record: SharedMemoryFile, saved: SavedFile, ctx: RestoreContext) -> int:
        return open_again(ctx.shared_memory(record.shm_id), saved.flags)

    def connect(self, record: SharedMemoryFile, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        restore_locks(record.locks, 'shared anonymous memory', saved, fd, ctx)
