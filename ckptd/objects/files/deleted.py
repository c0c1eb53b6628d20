# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files without a name: made under their old name, or a similar one, and unlinked at once.

Several descriptions and mappings may share one such file. The first user makes it; a kind returns `open_nameless` of
it.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePath
from typing import TypeVar

from ckptd.errors import CkptError, Finding
from ckptd.image.records import Extent
from ckptd.kernel.creds import CAP_MKNOD
from ckptd.objects.files.base import (
    DELETED,
    ByUser,
    FileLookup,
    FileMaking,
    Needs,
    OpenFile,
    finding,
    open_again,
)
from ckptd.objects.files.content import ContentSegment, content_size, restore_content

T = TypeVar('T')

TRIES = 100


def home_of(path: str, lookup: FileLookup) -> str:
    """Return the directory in which a deleted file is made again: its own, or the next one above that still exists and
    is writable; '' if there is none."""
    for parent in PurePath(path).parents if path.startswith('/') else ():
        found = lookup.lstat(str(parent))
        if found and stat.S_ISDIR(found.st_mode) and lookup.may(str(parent), os.W_OK | os.X_OK):
            return str(parent)
    return ''


def deleted_findings(path: str, lookup: FileLookup) -> list[Finding]:
    """List findings about a file that is made again where it was deleted."""
    home, own = home_of(path, lookup), str(PurePath(path).parent)
    if not home:
        return [finding('EACCES', f'{path} was deleted and cannot be made again in {own}',
                        'make that directory, writable for the owner of the tree')]
    if home != own:
        return [finding('ENOENT', f'{own} is gone or not writable: the deleted {PurePath(path).name} is made in {home}',
                        f'make {own} again', 'warning')]
    return []


def names_for(path: str) -> Iterator[str]:
    """Yield names to try, the old one first, because /proc/PID/fd continues to show it."""
    name = PurePath(path).name
    yield name
    for _ in range(TRIES):
        yield f'.{name[:200]}.{secrets.token_hex(4)}'


def flag_findings(file: OpenFile) -> list[Finding]:
    """Return a warning about O_NOFOLLOW of a file that a magic link opens again: a deleted one, or a FIFO."""
    if not file.flags & os.O_NOFOLLOW:
        return []
    return [finding('EOPNOTSUPP', f'O_NOFOLLOW of {file.path} is not kept',
                    'only fcntl(2) F_GETFL shows the difference', 'warning')]


@contextmanager
def opened_home(path: str, ctx: FileMaking) -> Iterator[int]:
    """Open the directory of `home_of` (O_PATH). Names are made and removed in this directory, wherever its path leads
    later. CkptError if there is none."""
    home = home_of(path, ctx)
    if not home:
        raise cannot_make(path)
    fd = ctx.open(home, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def make_in_home(path: str, ctx: FileMaking, make: Callable[[str, int], T]) -> T:
    """Return the result of `make(name, directory fd)` with the user's rights, for the first name that is free.

    make raises FileExistsError if the name exists. CkptError if there is no place for the file.
    """
    with opened_home(path, ctx) as home:
        for name in names_for(path):
            with suppress(FileExistsError), ctx.as_user():
                return make(name, home)
    raise cannot_make(path)


def cannot_make(path: str) -> CkptError:
    return CkptError(f'{path} was deleted and cannot be made again', errno=errno.EACCES, resource=path,
                     hint='make its directory, writable for the owner of the tree')


def make_nameless(path: str, ctx: FileMaking, flags: int) -> int:
    """Make an empty file (mode 0600) of the user without a name. CkptError if there is no place for one.

    O_CREAT with O_EXCL opens exactly the file that it makes (open(2)), whatever happens to its name afterwards. With
    O_TMPFILE the file would never have a name, and /proc would show a number in place of the old name.
    """
    def make(name: str, home: int) -> int:
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=home)
        unlink_new(name, home, fd)
        return fd
    return make_in_home(path, ctx, make)


def make_symlink(path: str, target: str, flags: int, ctx: FileMaking) -> int:
    """Make a symbolic link without a name with the user's rights. Return its O_PATH fd. CkptError for lack of room."""
    return _make_node(path, lambda name, home: os.symlink(target, name, dir_fd=home), flags | os.O_NOFOLLOW, ctx)


def make_device(path: str, mode: int, device: int, flags: int, ctx: FileMaking) -> int:
    """Make a device node without a name with the user's rights and open it. mknod(2) requires CAP_MKNOD."""
    def make(name: str, home: int) -> None:
        os.mknod(name, stat.S_IFMT(mode) | 0o600, device, dir_fd=home)
        os.chmod(name, mode & 0o777, dir_fd=home)
    # O_NOCTTY: a terminal does not become a controlling terminal
    return _make_node(path, make, flags | os.O_NOCTTY, ctx)


def device_findings(path: str, lookup: FileLookup) -> list[Finding]:
    """List the reasons why a deleted device node cannot be made again."""
    if not lookup.uid and lookup.capable(CAP_MKNOD):
        return []
    return [finding('EPERM', f'{path} is a deleted device node, and only root can make it again (mknod)',
                    'restore as root')]


def removed_directory(path: str, mode: int, ctx: FileMaking) -> int:
    """Return an O_PATH fd of a removed directory. The caller does not close it.

    The first call for a path makes the directory, and open files and working directories share it. It is empty, and no
    entries can be added to it.
    """
    def make(name: str, home: int) -> None:
        os.mkdir(name, 0o700, dir_fd=home)
        os.chmod(name, mode & 0o1777, dir_fd=home)
    return ctx.once(('removed', path), lambda: _make_node(path, make, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, ctx,
                                                          remove=os.rmdir))


def is_removed(path: str, lookup: FileLookup) -> bool:
    """Return whether the path of a working directory in /proc is that of a removed directory."""
    return path.endswith(DELETED) and lookup.lstat(path) is None


def open_directory(path: str, ctx: FileMaking) -> int:
    """Open a working or root directory by its path in /proc. Return an O_PATH fd.

    The mode of a removed directory is known only if the tree also has it open.
    """
    flags = os.O_PATH | os.O_DIRECTORY
    if not is_removed(path, ctx):
        return ctx.open(path, flags)
    return open_again(removed_directory(path.removesuffix(DELETED), 0o755, ctx), flags)


def _make_node(path: str, make: Callable[[str, int], None], flags: int, ctx: FileMaking, *,
               remove: Callable[..., None] = os.unlink) -> int:
    """Make a file with the user's rights, open it and remove its name. CkptError if there is no place for it.

    make(name, directory fd) raises FileExistsError if the name exists.
    """
    def make_and_open(name: str, home: int) -> int:
        make(name, home)
        try:
            fd = os.open(name, flags | os.O_CLOEXEC, dir_fd=home)
        except BaseException:
            remove(name, dir_fd=home)
            raise
        unlink_new(name, home, fd, remove)
        return fd
    return make_in_home(path, ctx, make_and_open)


def unlink_new(name: str, home: int, fd: int, remove: Callable[..., None] = os.unlink) -> None:
    """Remove the name of a new file. If that fails, close `fd`, the open file."""
    try:
        remove(name, dir_fd=home)
    except BaseException:
        os.close(fd)
        raise


def whole(content: Iterable[Extent]) -> tuple[ContentSegment, ...]:
    """Return the content of a Backing record, consecutive extents from byte 0 on, as segments."""
    found, at = [], 0
    for extent in content:
        found.append(ContentSegment(at, extent))
        at += extent.length
    return tuple(found)


def deleted_file(path: str, device: int, inode: int, size: int, mode: int, segments: Iterable[ContentSegment],
                 ctx: FileMaking) -> int:
    """Return the file that had this inode, as FileMaking.once does: the first user makes it, open for reading.
    `open_nameless` opens it in other ways: a file that is open for writing cannot be a task's program (kernel/fork.c,
    replace_mm_exe_file).

    It serves descriptions and mappings of one file alike. Its owner is that of a new file, see `set_owner`.
    """
    def make() -> int:
        fd = make_nameless(path, ctx, os.O_RDWR)
        try:
            restore_content(fd, size, segments, ctx)
            with ctx.as_user():
                os.fchmod(fd, mode & 0o777)
            return open_nameless(fd, os.O_RDONLY, ctx)
        finally:
            os.close(fd)
    return ctx.once(_key(device, inode), make)


def deleted_takes(path: str, device: int, inode: int, segments: Iterable[ContentSegment]) -> Needs:
    """Return the needs of `deleted_file`, mainly its content."""
    return Needs(_key(device, inode), disk=content_size(segments), path=path)


def _key(device: int, inode: int) -> Hashable:
    return 'deleted', device, inode


def open_nameless(base: int, flags: int, user: ByUser) -> int:
    """Open a description of a file that was made with the user's rights, even if its mode, which is set already, would
    not allow it."""
    with user.as_user():
        mode = stat.S_IMODE(os.fstat(base).st_mode)
        if mode & 0o600 == 0o600:
            return open_again(base, flags)
        os.fchmod(base, mode | 0o600)
        try:
            return open_again(base, flags)
        finally:
            os.fchmod(base, mode)
