# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check files and other objects with a name outside of the tree: they must exist, be unchanged, and be accessible to
the owner of the tree."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from ckptd.errors import Finding, ImageDamaged, errno_name
from ckptd.image.grammar import Struct
from ckptd.image.identity import FileIdentity, changes
from ckptd.image.records import (
    FILE_PRIVATE,
    FILE_SHARED,
    SHARED_MEMORY,
    SYSV,
    Backing,
    FdTable,
    Fs,
    Mm,
    SavedFile,
    SharedMemory,
    Vma,
)
from ckptd.kernel.creds import CAP_SYS_CHROOT
from ckptd.kernel.procfs import read_file
from ckptd.kernel.shm import shmctl_stat
from ckptd.kernel.stat import read_stat
from ckptd.objects.files.base import DELETED
from ckptd.objects.files.deleted import deleted_findings, home_of, is_removed
from ckptd.objects.files.linked import is_name
from ckptd.objects.verify import decode, file_ids, payload_flaws
from ckptd.restore.checks.context import CheckContext, about, once
from ckptd.restore.mapped_objects import may_write, missing_but_kept

KEPT = 'is not the file that it was: the tree gets its own, with the content that the image has, and without a name'
_NEXT_ID = '/proc/sys/kernel/shm_next_id'


def check(context: CheckContext) -> list[Finding]:
    named = [*_open_files(context), *_mapped_files(context), *_directories(context)]
    return once([*(_by_whom(context, row) for row in named), *_segments(context)])


def _by_whom(context: CheckContext, row: Finding) -> Finding:
    """Complete the hint for root, who has access to the file and may not expect that the rights of another user
    count."""
    uid = context.for_owner
    if not uid or row.severity == 'warning':
        return row
    if row.errno in ('EACCES', 'EPERM'):
        return replace(row, hint=f'files are opened with the rights of uid {uid}, who owns the image: give them access '
                            'to it, or checkpoint the tree as root')
    if row.errno == 'ENOENT':
        return replace(row, hint=f'{row.hint}; uid {uid}, who owns the image, must have access to it')
    return row


# ---------------------------------------------------------------- open files

def _open_files(context: CheckContext) -> Iterator[Finding]:
    holders, vpids = _holders(context), {task.vpid for task in context.plan.tasks}
    known = file_ids(context.reader)
    for saved in context.reader.every(SavedFile):
        vpid, fd = holders.get(saved.file_id, (0, -1))
        resource = f'fd {fd}' if vpid else 'file'
        if saved.owner in vpids:
            yield from _owner(context, saved, vpid, resource)
        try:
            kind, record = decode(saved, context.lookup.kinds)
            for flaw in payload_flaws(kind, record, context.reader, known):
                raise ImageDamaged(f'{saved.link}: {flaw}', resource=resource)
            if not kind.late(record, saved) and (row := _out_of_reach(context, vpid, resource, _path(context, record))):
                yield row
                continue
            found = kind.restart_findings(record, saved, context.lookup)
        except ImageDamaged as error:
            yield about(vpid, resource, errno_name(error.errno), error.message, error.hint)
        except OSError as error:
            yield about(vpid, resource, errno_name(error.errno or errno.EIO),
                        f'{saved.link} cannot be inspected: {error.strerror}', 'check that its file system answers')
        else:
            for one in found:
                yield replace(one, pid=vpid, resource=resource)


def _owner(context: CheckContext, saved: SavedFile, vpid: int, resource: str) -> Iterator[Finding]:
    """Check owners of file signals. They are sent with the rights of the user who requested them (fcntl(2),
    F_SETOWN_EX)."""
    own = context.request.caller.uid
    if strangers := sorted({saved.owner_uid, saved.owner_euid} - {own}) if own else []:
        yield about(vpid, resource, 'EPERM', f'its signals (F_SETOWN) are sent with the rights of uid {strangers[0]}, '
                    f'but the caller is uid {own}', 'restore it as root')


def _path(context: CheckContext, record: Struct) -> str:
    """Return the path that a restart opens for an open file; for a deleted file, the directory that it is created in;
    '' if the file has no path."""
    path, link = str(getattr(record, 'path', '')), str(getattr(record, 'link', ''))
    return link or (home_of(path, context.lookup) if getattr(record, 'deleted', 0) else path)


def _out_of_reach(context: CheckContext, vpid: int, resource: str, path: str) -> Finding | None:
    if path and (reason := context.lookup.out_of_reach(path)):
        return about(vpid, resource, 'EACCES', f'{path} is not opened: {reason}', 'put back what was there at the '
                     'time of the checkpoint')
    return None


def _holders(context: CheckContext) -> dict[int, tuple[int, int]]:
    """Return the first (vpid, fd) that refers to each description."""
    found: dict[int, tuple[int, int]] = {}
    for files_id, vpid in context.plan.users('files_id').items():
        for fd in context.reader.get(FdTable, files_id).fds:
            found.setdefault(fd.file_id, (vpid, fd.fd))
    return found


# ---------------------------------------------------------------- mapped files

def _mapped_files(context: CheckContext) -> Iterator[Finding]:
    """Check the mapped files, by their first user and by the access that each needs: os.R_OK ..."""
    users = context.plan.users('mm_id')
    first: dict[int, tuple[int, str]] = {}
    access: dict[int, int] = {}
    for vma in context.reader.every(Vma):
        if vma.kind in (FILE_PRIVATE, FILE_SHARED) and vma.mm_id in users:
            first.setdefault(vma.object, (users[vma.mm_id], f'vma {vma.start:x}-{vma.end:x}'))
            wanted = os.R_OK | (os.W_OK if vma.kind == FILE_SHARED and may_write(vma) else 0)
            access[vma.object] = access.get(vma.object, 0) | wanted
    for mm in context.reader.every(Mm):
        if mm.mm_id in users and mm.exe:
            first.setdefault(mm.exe, (users[mm.mm_id], 'exe'))
            # PR_SET_MM_EXE_FILE requires the right to execute (kernel/sys.c, prctl_set_mm_exe_file)
            access[mm.exe] = access.get(mm.exe, 0) | os.R_OK | os.X_OK
    opened = {saved.link for saved in context.reader.every(SavedFile)}
    for number, (vpid, resource) in first.items():
        yield from _backing(context, context.reader.get(Backing, number), vpid, resource, access[number], opened)


def _backing(context: CheckContext, record: Backing, vpid: int, resource: str, access: int, opened: set[str]
             ) -> Iterator[Finding]:
    if record.link:
        yield from _linked(context, record, vpid, resource, access)
        return
    if record.deleted:
        if row := _out_of_reach(context, vpid, resource, home_of(record.path, context.lookup)):
            yield row
        for one in deleted_findings(record.path, context.lookup):
            yield replace(one, pid=vpid, resource=resource)
        return
    if row := _out_of_reach(context, vpid, resource, record.path):
        yield row
        return
    if not record.mode:
        return          # it was not accessible when it was dumped
    if missing_but_kept(record, context.lookup):
        for one in deleted_findings(record.path, context.lookup):
            yield replace(one, pid=vpid, resource=resource)
        yield about(vpid, resource, 'ENOENT', f'{record.path} {KEPT}', 'others do not see what the tree writes there '
                    'from then on: put the file back if they should', 'warning')
        return
    found = context.lookup.lstat(record.path)
    words = changes(FileIdentity.of_backing(record), found)
    how = f'{record.path} {" and ".join(words)}'
    # if the file is open as well, its kind reports whether it can be rolled back
    rolled_back = context.lookup.changed_files == 'rollback' and record.path in opened
    if found is None:
        if not rolled_back:
            yield about(vpid, resource, 'ENOENT', how, 'put the file back where it was')
    elif stat.S_IFMT(found.st_mode) != stat.S_IFMT(record.mode):
        yield about(vpid, resource, 'ESTALE', how, 'put the file back')
    elif not context.lookup.may(record.path, access):
        yield about(vpid, resource, 'EACCES', f'{record.path} may not be {_verbs(access)}',
                    'run as its owner, or as root')
    elif words and context.lookup.changed_files == 'accept':
        yield about(vpid, resource, 'ESTALE', how, 'the tree finds it as it is now', 'warning')
    elif words and not rolled_back:
        yield about(vpid, resource, 'ESTALE', how, 'put exactly this file back (of a package: the same version); '
                    '--changed-files=accept uses the present file, at the risk of a crash')


def _linked(context: CheckContext, record: Backing, vpid: int, resource: str, access: int) -> Iterator[Finding]:
    found = context.lookup.lstat(record.link)
    if found is None or found.st_ino != record.inode or not is_name(record.link):
        yield about(vpid, resource, 'ENOENT', f'{record.path} was deleted, and its name for the image, {record.link}, '
                    'is gone', 'it can be restored once: a restart takes that name away')
    elif not context.lookup.may(record.link, access):
        yield about(vpid, resource, 'EACCES', f'{record.link} may not be {_verbs(access)}',
                    'run as its owner, or as root')


def _verbs(access: int) -> str:
    names = {os.R_OK: 'read', os.W_OK: 'written', os.X_OK: 'executed'}
    return ' and '.join(name for bit, name in names.items() if access & bit)


# ---------------------------------------------------------------- directories

def _directories(context: CheckContext) -> Iterator[Finding]:
    for fs_id, vpid in context.plan.users('fs_id').items():
        record = context.reader.get(Fs, fs_id)
        yield from _directory(context, vpid, 'cwd', 'working directory', record.cwd)
        if record.root != '/':
            yield from _directory(context, vpid, 'root', 'root directory', record.root)
            # a user who may set up /etc as the program sees it can pretend to be anyone to it
            by_root = not context.lookup.rights.uid or context.lookup.by_root
            if not (by_root or context.plan.namespaces.user) or not context.may_here(CAP_SYS_CHROOT):
                yield about(vpid, 'root', 'EPERM', f'its root directory is {record.root}, and the caller may not '
                            'change that of a process', 'restore it as root')


def _directory(context: CheckContext, vpid: int, resource: str, what: str, path: str) -> Iterator[Finding]:
    if is_removed(path, context.lookup):
        for one in deleted_findings(path.removesuffix(DELETED), context.lookup):
            yield replace(one, pid=vpid, resource=resource)
        return
    if row := _out_of_reach(context, vpid, resource, path):
        yield row
        return
    try:
        os.close(context.lookup.open(path, os.O_PATH | os.O_DIRECTORY))
    except (OSError, ValueError) as error:
        number = (error.errno if isinstance(error, OSError) else None) or errno.ENOENT
        yield about(vpid, resource, errno_name(number), f'its {what} {path} is not available: {os.strerror(number)}',
                    'make that directory again')
        return
    if not context.lookup.may(path, os.X_OK):
        yield about(vpid, resource, 'EACCES', f'its {what} {path} may not be entered',
                    'give the caller the right to it (chmod), or restore as root')


# ---------------------------------------------------------------- System V segments

def _segments(context: CheckContext) -> Iterator[Finding]:
    users = context.plan.users('mm_id')
    first: dict[int, int] = {}
    for vma in context.reader.every(Vma):
        if vma.kind == SHARED_MEMORY and vma.mm_id in users:
            first.setdefault(vma.object, users[vma.mm_id])
    for record in context.reader.every(SharedMemory):
        if record.kind == SYSV and record.shm_id in first:
            yield from _segment(context, record, first[record.shm_id])


def _segment(context: CheckContext, record: SharedMemory, vpid: int) -> Iterator[Finding]:
    """Check a System V segment. One that exists and is not attached is used again, see MappedObjects; otherwise its id
    and key must be free."""
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
                        f'last by {_name(found.last)}', '"ipcs -m -p" shows its users; "ipcrm -m" removes it')
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


def _name(pid: int) -> str:
    with suppress(OSError):
        return f'{read_stat(pid).comm}[{pid}]'
    return f'process {pid}, which is gone'
