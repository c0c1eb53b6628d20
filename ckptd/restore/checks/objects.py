# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check files and other objects with a name outside of the tree: they must exist, be unchanged, and be accessible to
the owner of the tree."""

import errno
import os
from collections.abc import Iterator
from dataclasses import replace

from ckptd.errors import Finding, ImageDamaged, errno_name
from ckptd.image.grammar import Struct
from ckptd.image.records import FdTable, Fs, SavedFile
from ckptd.kernel.creds import CAP_SYS_CHROOT
from ckptd.objects.files.base import DELETED
from ckptd.objects.files.deleted import deleted_findings, home_of, is_removed
from ckptd.objects.ipc import registry as ipc
from ckptd.objects.mappings.registry import restart_findings
from ckptd.objects.verify import decode, file_ids, payload_flaws
from ckptd.restore.checks.context import CheckContext, about, once


def check(context: CheckContext) -> list[Finding]:
    return once([*map(context.by_whom, _open_files(context)), *_given(context), *restart_findings(context),
                 *ipc.restart_findings(context),
                 *map(context.by_whom, _directories(context))])


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
            path = _path(context, record)
            if not kind.late(record, saved) and (row := context.out_of_reach(vpid, resource, path, saved.flags)):
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


def _given(context: CheckContext) -> Iterator[Finding]:
    """Check that every file that the caller gave has a place. `_open_files` comes before."""
    for what in context.lookup.inherited.left:
        yield about(0, 'inherit', 'EINVAL', f'a file descriptor was given for {what}, but the image has no connection '
                    'left that takes it', 'leave it out, or give it for another peer')


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


def _holders(context: CheckContext) -> dict[int, tuple[int, int]]:
    """Return the first (vpid, fd) that refers to each description."""
    found: dict[int, tuple[int, int]] = {}
    for files_id, vpid in context.plan.users('files_id').items():
        for fd in context.reader.get(FdTable, files_id).fds:
            found.setdefault(fd.file_id, (vpid, fd.fd))
    return found


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
    if row := context.out_of_reach(vpid, resource, path):
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
