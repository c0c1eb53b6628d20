# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names of unix sockets (unix(7)): a path, relative or not, or an abstract name.

getsockname(2) returns a path as it was given to bind(2), so a relative one is bound again in the same directory. A
socket whose file was deleted or replaced, or whose listener is gone, is bound in a file system that no other process
sees: whatever has its path now stays there.
"""

import errno
import os
import socket
import stat
from collections.abc import Collection, Hashable, Iterator
from pathlib import Path, PurePath

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.kernel.clone import CLONE_NEWNS
from ckptd.kernel.fork import run_in_child
from ckptd.kernel.mount import MS_PRIVATE, MS_REC, mount
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.netlink import UnixSocket
from ckptd.kernel.timens import unshare
from ckptd.kernel.unix import SS_LISTEN, bind_name, find_holders, is_dead, open_bound
from ckptd.objects.files.base import DELETED, FileLookup, FileMaking, finding
from ckptd.objects.files.content import owner_findings
from ckptd.objects.files.tables import JobTables

_INODE = (1 << 32) - 1      # sock_diag shows the low half of an inode number


@layout
class SocketName(Struct):
    """The name of a socket, and the file that it is bound to."""
    name: bytes     # as in sun_path, b'' for none; an abstract one begins with NUL
    base: str       # the directory that a relative path begins in; the root directory of a process in a chroot(2)
    mode: U32       # of the file
    uid: U32
    gid: U32
    device: U64
    inode: U64      # 0 for an abstract name, and if the file is gone
    deleted: U8     # the path does not lead to it any more, or no socket can be reached by it

    @property
    def is_path(self) -> bool:
        return bool(self.name) and not self.name.startswith(b'\0')

    @property
    def path(self) -> str:
        """The absolute path."""
        name = os.fsdecode(self.name)
        return f'{self.base.rstrip("/")}/{name.lstrip("/")}' if self.base else name

    @property
    def home(self) -> str:
        """The directory of the path."""
        return str(PurePath(self.path).parent)

    @property
    def text(self) -> str:
        """The name for people: an abstract one as in ss(8)."""
        return self.name.replace(b'\0', b'@').decode('utf-8', 'backslashreplace')

    @property
    def is_hidden(self) -> bool:
        """Whether it is bound out of sight. A user's dead file gets a new inode instead."""
        return bool(self.deleted and (not self.inode or not os.geteuid()))

    def key(self, kind: int) -> tuple[Hashable, ...]:
        """Equal for the sockets that share one file or one abstract name."""
        return kind, self.name, self.device, self.inode


NO_NAME = SocketName(b'', '', 0, 0, 0, 0, 0, 0)


# ---------------------------------------------------------------- checkpoint

def dump_name(own: UnixSocket, sock: socket.socket | None, tid: int, tables: JobTables) -> SocketName:
    """Dump the name of a socket. sock: the socket, if it is at hand. tid: a task that has it."""
    if not own.name or own.name.startswith(b'\0'):
        return SocketName(own.name, '', 0, 0, 0, 0, 0, 0)
    where, exact = _file_of(sock)
    name = os.fsdecode(own.name)
    for base in _bases(name, where, tables.tasks or (tid,)):
        path = f'{base.rstrip("/")}/{name.lstrip("/")}' if base else name
        found = lstat_of_task(tid, path)
        if found and stat.S_ISSOCK(found.st_mode) and identity(found, exact=bool(exact)) == (exact or own.file):
            return SocketName(own.name, base, found.st_mode, found.st_uid, found.st_gid, found.st_dev, found.st_ino,
                              _is_unreachable(path, own, tables))
    return SocketName(own.name, '', 0, 0, 0, 0, 0, 1)


def name_refusals(own: UnixSocket, sock: socket.socket, tid: int, tables: JobTables) -> list[Finding]:
    """Refuse a relative path if the directory that it begins in is unknown."""
    name = dump_name(own, sock, tid, tables)
    if not name.is_path or name.name.startswith(b'/') or not name.deleted or name.inode:
        return []
    where, exact = _file_of(sock)
    found = lstat_of_task(tid, where) if where else None
    if exact and (found is None or identity(found, exact=True) != exact):
        return []       # the file is gone
    return [finding('ENOENT', f'a socket is bound to {name.text}, relative to a directory that no process of the tree '
                    'works in now', 'let the program bind it to an absolute path, or checkpoint it as root')]


def _file_of(sock: socket.socket | None) -> tuple[str, tuple[int, ...]]:
    """Return the present path of the bound file, and its device and inode; '' and () if we may not ask."""
    if sock is None:
        return '', ()
    try:
        fd = open_bound(sock)
    except OSError:     # without CAP_NET_ADMIN
        return '', ()
    try:
        where = os.readlink(f'/proc/self/fd/{fd}')  # noqa: PTH115
        return where.removesuffix(DELETED), identity(os.fstat(fd), exact=True)
    finally:
        os.close(fd)


def identity(of: os.stat_result, *, exact: bool = False) -> tuple[int, ...]:
    """Return what identifies a file; as in UnixSocket.file if not exact."""
    return (of.st_dev, of.st_ino) if exact else (os.major(of.st_dev), os.minor(of.st_dev), of.st_ino & _INODE)


def _bases(name: str, where: str, tids: Collection[int]) -> Iterator[str]:
    """Yield directories that the name may begin in; '' for an absolute path of a process without chroot(2)."""
    suffix = '/' + os.path.normpath(name).lstrip('/')
    if name.startswith('/'):
        yield ''
    if where.endswith(suffix) and len(where) > len(suffix):
        yield where.removesuffix(suffix)
    if not name.startswith('/'):
        for tid in dict.fromkeys(tids):
            try:
                yield os.readlink(f'/proc/{tid}/cwd')  # noqa: PTH115
            except OSError:
                continue


def _is_unreachable(path: str, own: UnixSocket, tables: JobTables) -> bool:
    """Whether no socket is bound to the file: those that a listener has accepted keep its name when it is closed."""
    if any(one.file == own.file and one.state == SS_LISTEN for one in tables.unix_sockets.values()):
        return False
    try:
        return is_dead(path)
    except OSError:
        return False


# ---------------------------------------------------------------- restart

def name_findings(name: SocketName, kind: int, what: str, lookup: FileLookup, tables: JobTables) -> list[Finding]:
    """List reasons why a socket cannot be bound to its name again."""
    if not name.name:
        return []
    if not name.is_path:
        taken = [one for one in tables.unix_sockets.values() if (one.name, one.type) == (name.name, kind)]
        return [_taken(name, taken[0])] if taken else []
    if name.base and name.name.startswith(b'/') and os.geteuid():
        return [finding('EPERM', f'{what} is bound to {name.text} below the root directory {name.base}',
                        'only root can bind it again: restore as root')]
    if name.is_hidden:
        return _hidden_findings(name, what, lookup)
    found, home = lookup.lstat(name.path), name.home
    if found and not stat.S_ISSOCK(found.st_mode):
        return [finding('EEXIST', f'{name.path}, which {what} is bound to, is another file now', 'move it away')]
    if found and (taken := _living(found, tables)):
        return [_taken(name, taken[0])]
    if not lookup.may(home, os.W_OK | os.X_OK):
        return [finding('EACCES', f'{what} is bound to {name.path}, and the user may not write its directory',
                        'make the directory again, or give the user the right to write it')]
    return owner_findings(name.path, name.uid, name.gid, lookup)


def _hidden_findings(name: SocketName, what: str, lookup: FileLookup) -> list[Finding]:
    if not os.geteuid():
        return []
    if not name.name.startswith(b'/'):
        return [finding('EPERM', f'{what} is bound to the deleted {name.text}',
                        'only root can bind it again: restore as root')]
    if lookup.lstat(name.path) is None and lookup.may(name.home, os.W_OK | os.X_OK):
        return []
    return [finding('EEXIST', f'{what} is bound to the deleted {name.path}, whose name is taken now or cannot be made',
                    'move that file away, make the directory again, or restore as root')]


def _living(found: os.stat_result, tables: JobTables) -> list[UnixSocket]:
    """Return the sockets that are bound to a file; sockets that a listener has accepted do not count."""
    same = [one for one in tables.unix_sockets.values() if one.file == identity(found)]
    return [one for one in same if one.state == SS_LISTEN] or [one for one in same if not one.peer]


def _taken(name: SocketName, by: UnixSocket) -> Finding:
    holder = find_holders({by.inode}).get(by.inode)
    where = f'{holder.comm}[{holder.pid}]' if holder else 'another process'
    return finding('EADDRINUSE', f'{name.text} is in use by {where}', 'end that process, or let it close its socket')


def bound_socket(name: SocketName, kind: int, ctx: FileMaking) -> int:
    """Return the socket of this type that is bound to the name, as `once` does."""
    def make() -> int:
        fd = socket.socket(socket.AF_UNIX, kind).detach()
        try:
            bind_again(fd, name, kind, ctx)
        except BaseException:
            os.close(fd)
            raise
        return fd
    return ctx.once(('unix name', *name.key(kind)), make)


def bind_again(fd: int, name: SocketName, kind: int, ctx: FileMaking) -> None:
    """Bind a socket to its name. Its file gets its former mode and owner."""
    if not name.is_path:
        _bind(fd, name)
    else:
        at = _bind_hidden(fd, name, ctx) if name.is_hidden else _bind_in_place(fd, name, ctx)
        ctx.once(('unix file', *name.key(kind)), lambda: at)
    ctx.once(('unix address', kind, name.name), lambda: os.dup(fd))


def file_of(name: SocketName, kind: int, ctx: FileMaking) -> int:
    """Return the O_PATH fd of the file of a socket that was bound before; -1 for an abstract name."""
    return ctx.once(('unix file', *name.key(kind)), _lost) if name.is_path else -1


def connect_to(fd: int, name: SocketName, kind: int, ctx: FileMaking) -> None:
    """Connect a socket to one that was bound before. OSError."""
    connect_to_path(fd, name, file_of(name, kind, ctx))


def connect_to_path(fd: int, name: SocketName, at: int) -> None:
    """Connect a socket to the one with this abstract name, or with the file of an O_PATH fd. OSError."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.connect(name.name if at < 0 else f'/proc/self/fd/{at}')


def sender_named(name: bytes, ctx: FileMaking) -> int:
    """Return a datagram socket with this name, as `once` does: that of the tree, or one for the restart only."""
    def make() -> int:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with sock:
            hidden = SocketName(name, '', 0, 0, 0, 0, 0, 1)
            if not hidden.is_path:
                _bind(sock.fileno(), hidden)
            else:
                os.close(_bind_hidden(sock.fileno(), hidden, ctx))
            return os.dup(sock.fileno())
    return ctx.once(('unix address', socket.SOCK_DGRAM, name), make)


def _bind(fd: int, name: SocketName) -> None:
    try:
        bind_name(fd, name.name)
    except OSError as error:
        raise CkptError(f'{name.text}: a socket cannot be bound to it: {error.strerror}', errno=error.errno,
                        resource=name.text, hint='find out which process uses the name (ss -xlp)') from error


def _bind_in_place(fd: int, name: SocketName, ctx: FileMaking) -> int:
    """Bind a socket to its path. Return an O_PATH fd of the new file."""
    mode, relative = stat.S_IMODE(name.mode), bool(name.base)
    own = os.fstat(fd).st_mode
    os.fchmod(fd, mode)     # the file gets the mode of the socket, without the bits of the umask, so never one too many
    at = ctx.bind(name.path, lambda: _bind_below(fd, name) if relative else bind_name(fd, name.name))
    try:
        os.fchmod(fd, own)
        with ctx.as_user():
            _set_owner(f'/proc/self/fd/{at}', mode, name.uid, name.gid)
    except BaseException:
        os.close(at)
        raise
    return at


def _set_owner(path: str, mode: int, uid: int, gid: int) -> None:
    of = os.stat(path)  # noqa: PTH116
    if (of.st_uid, of.st_gid) != (uid, gid):
        try:
            os.chown(path, uid, gid)
        except PermissionError:
            mode &= 0o777       # owner_findings has warned about it
    if stat.S_IMODE(of.st_mode) != mode:
        os.chmod(path, mode)  # noqa: PTH101


def _bind_below(fd: int, name: SocketName) -> None:
    """Bind a socket in another working directory, or root directory for an absolute path."""
    def work() -> None:
        if name.name.startswith(b'/'):
            os.chroot(name.base)
        else:
            os.chdir(name.base)
        bind_name(fd, name.name)
    run_in_child(work)


def _bind_hidden(fd: int, name: SocketName, ctx: FileMaking) -> int:
    """Bind a socket to a path that no other process sees. Return an O_PATH fd of the deleted file."""
    if os.geteuid():
        return _bind_for_a_moment(fd, name, ctx)
    ours, theirs = socket.socketpair()
    path = os.fsdecode(name.name)

    def work() -> None:
        unshare(CLONE_NEWNS)
        mount(None, b'/', None, MS_REC | MS_PRIVATE, None)
        mount(b'tmpfs', b'/proc', b'tmpfs', 0, None)
        os.chroot('/proc')
        os.chdir('/')
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        bind_name(fd, name.name)
        socket.send_fds(theirs, [b'f'], [os.open(path, os.O_PATH | os.O_NOFOLLOW)])
        os.unlink(path)  # noqa: PTH108

    with ours, theirs:
        try:
            run_in_child(work)
        except OSError as error:
            raise CkptError(f'the deleted {name.text} cannot be bound again: {error.strerror}', errno=error.errno,
                            resource=name.text, hint='restore as root, with CAP_SYS_ADMIN') from error
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(fds[0], False)
    return fds[0]


def _bind_for_a_moment(fd: int, name: SocketName, ctx: FileMaking) -> int:
    """Bind a socket to a path that is free, and remove its file."""
    at = ctx.bind(name.path, lambda: bind_name(fd, name.name))
    with ctx.as_user():
        os.unlink(name.path)  # noqa: PTH108
    return at


def _lost() -> int:
    raise CkptError('a socket that another one is connected to was not made', errno=errno.ENOTCONN)
