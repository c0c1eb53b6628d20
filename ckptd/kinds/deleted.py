# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files without a name: made under their old one, or one like it, and unlinked at once.

Several descriptions, and mappings, share one such file. Who asks first makes it; a kind returns `open_nameless` of it.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import PurePath

from ckptd.errors import CkptError
from ckptd.image.records import Extent
from ckptd.kinds.base import Looking, Reason, Restoring, open_again
from ckptd.kinds.content import Segment, restore_content

TRIES = 100


def home_of(path: str, looking: Looking) -> str:
    """The directory that a deleted file is made in again: its own, or the next one above that is still there and may be
    written; '' if there is none."""
    for parent in PurePath(path).parents if path.startswith('/') else ():
        found = looking.lstat(str(parent))
        if found and stat.S_ISDIR(found.st_mode) and looking.may(str(parent), os.W_OK | os.X_OK):
            return str(parent)
    return ''


def deleted_obstacles(path: str, looking: Looking) -> list[Reason]:
    """Of a file that is made again where it was deleted."""
    home, own = home_of(path, looking), str(PurePath(path).parent)
    if not home:
        return [Reason('EACCES', f'{path} was deleted and cannot be made again in {own}',
                       'make that directory, writable for whose tree it is')]
    if home != own:
        return [Reason('ENOENT', f'{own} is gone or not writable: the deleted {PurePath(path).name} is made in {home}',
                       f'make {own} again', 'warning')]
    return []


def names_for(path: str, home: str) -> Iterator[str]:
    """Names to try in `home`, the old one first: it is what /proc/PID/fd goes on to show."""
    name = PurePath(path).name
    yield f'{home.rstrip("/")}/{name}'
    for _ in range(TRIES):
        yield f'{home.rstrip("/")}/.{name[:200]}.{secrets.token_hex(4)}'


def make_nameless(path: str, ctx: Restoring, flags: int) -> int:
    """A new empty file (mode 0600) that had a name only for a moment. CkptError if there is no place for one."""
    home = home_of(path, ctx)
    for name in names_for(path, home) if home else ():
        try:
            with ctx.as_user():
                fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                os.unlink(name)  # noqa: PTH108
        except FileExistsError:
            continue
        return fd
    raise CkptError(f'{path} was deleted and cannot be made again', errno=errno.EACCES, resource=path,
                    hint='make its directory, writable for whose tree it is')


def whole(content: Iterable[Extent]) -> tuple[Segment, ...]:
    """The content of a Backing record, extents one behind the other from byte 0 on, as segments."""
    found, at = [], 0
    for extent in content:
        found.append(Segment(at, extent))
        at += extent.length
    return tuple(found)


def deleted_file(path: str, device: int, inode: int, size: int, mode: int, segments: Iterable[Segment],
                 ctx: Restoring) -> int:
    """The file that had this inode, as of Restoring.once: made by who asks first, open for reading. `open_nameless`
    opens it otherwise: what somebody may write to cannot be a task's program (kernel/fork.c, replace_mm_exe_file).

    For descriptions and mappings of one file alike. Its owner is that of a new file, see `set_owner`.
    """
    def make() -> int:
        fd = make_nameless(path, ctx, os.O_RDWR)
        try:
            restore_content(fd, size, segments, ctx)
            os.fchmod(fd, mode & 0o777)
            return open_nameless(fd, os.O_RDONLY)
        finally:
            os.close(fd)
    return ctx.once(('deleted', device, inode), make)


def open_nameless(base: int, flags: int) -> int:
    """A description of a file that is ours, also where its mode, set already, would not let us."""
    mode = stat.S_IMODE(os.fstat(base).st_mode)
    if mode & 0o600 == 0o600:
        return open_again(base, flags)
    os.fchmod(base, mode | 0o600)
    try:
        return open_again(base, flags)
    finally:
        os.fchmod(base, mode)
