# SPDX-License-Identifier: LGPL-2.1-or-later
"""A System V segment (shmget(2), shmat(2))."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from mmap import PROT_EXEC

from ckptd.errors import Busy, CkptError, Finding, ImageDamaged, PermissionDenied, errno_name
from ckptd.image.records import PAGE, SHARED_MEMORY, SYSV, SharedMemory, Vma
from ckptd.journal.steps import MakeSegment
from ckptd.kernel.hugetlb import shm_group
from ckptd.kernel.maps import Mapping
from ckptd.kernel.mman import MREMAP_FIXED, MREMAP_MAYMOVE
from ckptd.kernel.procfs import read_file
from ckptd.kernel.shm import (
    SHM_DEST,
    SHM_EXEC,
    SHM_RDONLY,
    ShmidDs,
    attached,
    shmctl_remove,
    shmctl_set,
    shmctl_stat,
    shmget_at,
)
from ckptd.kernel.shmem import SYSV_PREFIX
from ckptd.kernel.stat import read_stat
from ckptd.objects.attributes.base import about
from ckptd.objects.files.base import finding
from ckptd.objects.mappings.base import (
    RELEASE,
    MappedSpace,
    MappingCheck,
    MappingMeans,
    MappingTables,
    SharedObject,
    label,
    may_write,
)
from ckptd.objects.mappings.shared_memory import SharedMemoryKind, rounded_up, whole_size
from ckptd.objects.support import Support
from ckptd.remote.script import Script

_NEXT_ID = '/proc/sys/kernel/shm_next_id'
_TO_ATTACH = 0o700      # mode that lets the owner attach a segment in every way


class SystemVMapping(SharedMemoryKind, object_kind=SYSV, prefixes=[SYSV_PREFIX]):
    """A segment, or a part of one."""
    support = Support('System V shared memory that is mapped',
                      refused='a segment of another IPC namespace; an id or key that is taken',
                      user='a segment of another user must be attachable for writing')
    ignores_protection = True       # of shmat(2)

    def __init__(self, tables: MappingTables) -> None:
        super().__init__(tables)
        self._prepared: set[int] = set()

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        """Refuse a segment of another IPC namespace. shmctl(2) uses the caller's namespace, where the same id is
        another segment or none. shmat(2) makes no private mapping; mmap(2) does, of a link in /proc/PID/map_files."""
        if not mapping.shared:
            return finding('EOPNOTSUPP', 'a private mapping of a System V segment', RELEASE)
        if os.path.samefile(f'/proc/{tid}/ns/ipc', '/proc/self/ns/ipc'):  # noqa: PTH121
            return None
        return finding('EOPNOTSUPP', 'a System V segment of another IPC namespace than that of ckptd', RELEASE)

    def complete(self, record: SharedMemory, shared: SharedObject, fd: int) -> SharedMemory:
        ipc = shmctl_stat(shared.inode)     # /proc/PID/maps shows the shmid as the inode
        return replace(record, key=ipc.key, mode=ipc.mode, uid=ipc.uid, gid=ipc.gid, size=ipc.size,
                       shmid=shared.inode)

    # ------------------------------------------------------------ restart

    def restart_findings(self, context: MappingCheck) -> Iterator[Finding]:
        first: dict[int, int] = {}
        for vma in context.reader.every(Vma):
            if vma.kind == SHARED_MEMORY and vma.mm_id in context.mm_users:
                first.setdefault(vma.object, context.mm_users[vma.mm_id])
        for record in context.reader.every(SharedMemory):
            if record.kind == SYSV and record.shm_id in first:
                yield from _check_segment(context, record, first[record.shm_id])

    def fd(self, number: int, means: MappingMeans, *, writable: bool) -> int:
        """Raise ImageDamaged: no file is open that refers to a segment."""
        raise ImageDamaged(f'SharedMemory {number}: a System V segment is no file', resource='memory.img')

    def open(self, vma: Vma, means: MappingMeans) -> int:
        """Return -1: a segment is attached by its shmid."""
        return -1

    def map(self, vma: Vma, protection: int, script: Script, space: MappedSpace) -> None:
        """Attach a segment. shmat(2) attaches all of it. If only a part was mapped, attach it elsewhere and move that
        part."""
        record, words = space.means.reader.get(SharedMemory, vma.object), label(vma)
        shmid = self._segment(record, space.means)
        flags = (0 if may_write(vma) else SHM_RDONLY) | (SHM_EXEC if vma.protection & PROT_EXEC else 0)
        length, whole = vma.end - vma.start, whole_size(record)
        if not vma.offset and length == whole:
            script.call('shmat', shmid, vma.start, flags, about=words, expect=vma.start)
            return
        # behind the arena there is room for the whole, as the tree has no mapping there
        room = rounded_up(space.stub.arena.end + PAGE, record.huge or PAGE)
        script.call('shmat', shmid, room, flags, about=words, expect=room)
        script.call('mremap', room + vma.offset, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, vma.start, about=words,
                    expect=vma.start)
        script.call('munmap', room, whole)

    def _segment(self, record: SharedMemory, means: MappingMeans) -> int:
        """Return the shmid of a segment, which is the same as before."""
        if record.shm_id not in self._prepared:
            self._prepared.add(record.shm_id)
            _make_segment(record, means)
        return record.shmid

    def finish(self, means: MappingMeans) -> None:
        """Set modes, and mark segments for destruction again that were marked, now that they are attached."""
        for record in means.reader.every(SharedMemory):
            if record.kind != SYSV or record.shm_id not in self._prepared:
                continue
            if record.mode & _TO_ATTACH != _TO_ATTACH and means.files.owns(shmctl_stat(record.shmid)):
                shmctl_set(record.shmid, record.uid, record.gid, record.mode & 0o777)
            if record.mode & SHM_DEST:
                shmctl_remove(record.shmid)


def _make_segment(record: SharedMemory, means: MappingMeans) -> None:
    mode = record.mode & 0o777
    found = _adopt(record, means)
    if not found:
        try:
            shmget_at(record.shmid, record.key, record.size, mode | _TO_ATTACH, record.huge)
        except OSError as error:
            raise CkptError(f'cannot make System V segment {record.shmid}: {error.strerror}', errno=error.errno,
                            resource=f'shmid {record.shmid}') from error
        means.note(MakeSegment(record.shmid, record.key, record.size, os.geteuid(), os.getegid(),
                               tuple(os.getgroups())))
    if not found or means.files.owns(found):
        # its owner may attach it until it has its content and is attached; `finish` sets the mode
        shmctl_set(record.shmid, record.uid, record.gid, mode | _TO_ATTACH)
    with attached(record.shmid, whole_size(record)) as view:
        for run in means.reader.shared_runs(record.shm_id):
            end = min(run.start + run.pages * PAGE, len(view))
            means.reader.pread_into(view[run.start:end], run.part, run.offset)


def _adopt(record: SharedMemory, means: MappingMeans) -> ShmidDs | None:
    """Take over a segment, which outlives its users: exactly the same one, if it is not in use now."""
    try:
        found = shmctl_stat(record.shmid)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EIDRM):
            return None
        raise
    if (found.key, found.size) != (record.key, record.size) or found.attached:
        raise Busy(f'System V segment {record.shmid} is in use', resource=f'shmid {record.shmid}',
                   hint='"ipcs -m -i" shows its users; "ipcrm -m" removes it')
    if not means.files.may_take(found):
        raise PermissionDenied(f'System V segment {record.shmid} may not be written',
                               resource=f'shmid {record.shmid}')
    return found


def _check_segment(context: MappingCheck, record: SharedMemory, vpid: int) -> Iterator[Finding]:
    """Check a System V segment. One that exists and is not attached is used again, see _adopt; otherwise its id and
    key must be free."""
    resource = f'shmid {record.shmid}'
    try:
        found = shmctl_stat(record.shmid)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EIDRM):
            yield about(vpid, resource, errno_name(error.errno or errno.EIO), 'a System V segment of another user '
                        f'has its id: {error.strerror}', f'have its owner remove it (ipcrm -m {record.shmid})')
            return
    else:
        if (found.key, found.size) != (record.key, record.size) or found.attached:
            yield about(vpid, resource, 'EBUSY', f'its System V segment is in use: attached {found.attached} times, '
                        f'last by {_process(found.last)}', '"ipcs -m -p" shows its users; "ipcrm -m" removes it')
        elif not context.lookup.may_take(found):
            yield about(vpid, resource, 'EACCES', f'its System V segment belongs to uid {found.uid}, and is not '
                        'writable for the owner of the image', f'have its owner remove it (ipcrm -m {record.shmid})')
        return
    if other := _by_key(record.key):
        yield about(vpid, resource, 'EEXIST', f'the key {record.key:#x} of its System V segment is that of segment '
                    f'{other} now', f'ipcrm -m {other} removes it')
    if not (context.lookup.by_root or context.lookup.may_own(record.uid, record.gid)):
        yield about(vpid, resource, 'EPERM', f'its System V segment belonged to uid {record.uid} and gid '
                    f'{record.gid}, and is gone: uid {context.lookup.uid} may not make one of theirs',
                    'keep the segment, or restore it as root')
    if record.huge and not (context.lookup.by_root or context.lookup.may_own(context.lookup.uid, shm_group())):
        yield about(vpid, resource, 'EPERM', 'a System V segment of huge pages cannot be made',
                    'restore it as root, or put the user into the group of the sysctl vm.hugetlb_shm_group')
    if not os.access(_NEXT_ID, os.W_OK, effective_ids=True):
        yield about(vpid, resource, 'EPERM', 'a System V segment with its old id cannot be made',
                    'restore it as root, or keep the segment (ipcs -m)')


def _by_key(key: int) -> int:
    """Return the shmid for a key; 0 if there is none (a shmid of 0 has never been free for long)."""
    if key:
        for line in read_file('/proc/sysvipc/shm').splitlines()[1:]:
            found, shmid = line.split(None, 2)[:2]
            if int(found) & 0xFFFFFFFF == key:
                return int(shmid)
    return 0


def _process(pid: int) -> str:
    with suppress(OSError):
        return f'{read_stat(pid).comm}[{pid}]'
    return f'process {pid}, which is gone'
