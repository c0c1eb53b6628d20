# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files that no kind matches: refused, under their real name."""

import errno
import os
import socket
import stat
from contextlib import suppress
from typing import NoReturn

from ckptd.errors import Finding, NotSupported, Refused
from ckptd.image.grammar import Struct
from ckptd.image.records import SavedFile
from ckptd.kernel import statfs
from ckptd.kernel.devices import driver_of
from ckptd.kernel.families import arguments_of
from ckptd.kernel.shmem import on_shm_mount
from ckptd.objects.files.base import Content, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.other_sockets import FamilyName, article, name_of
from ckptd.objects.files.tables import JobTables
from ckptd.objects.support import Support

# the text behind 'anon_inode:' in the link, without brackets and number; the names come from the kernel's callers of
# anon_inode_getfile() and similar functions
_ANON = 'anon_inode:'
_ANON_INODES = {
    'bpf-map': 'a BPF map', 'bpf-prog': 'a BPF program', 'bpf_link': 'a BPF link', 'bpf_iter': 'a BPF iterator',
    'btf': 'a BPF type description (BTF)',
    'fscontext': 'a file system context (fsopen)', 'io_uring': 'an io_uring',
    'kvm-vcpu': 'a KVM virtual CPU', 'kvm-vm': 'a KVM virtual machine', 'landlock-ruleset': 'a Landlock ruleset',
    'perf_event': 'a perf event', 'pidfd': 'a pidfd', 'seccomp notify': 'a seccomp listener',
    'userfaultfd': 'a userfaultfd',
}
_BY_MAGIC = {
    statfs.HUGETLBFS_MAGIC: 'a file of huge pages',
    statfs.NSFS_MAGIC: 'a namespace', statfs.PID_FS_MAGIC: 'a pidfd', statfs.SECRETMEM_MAGIC: 'secret memory',
}
# what to do about a file of the kernel or of a driver, by the name in the link or in /proc/devices and /proc/misc
_CLOSE = 'close it before the checkpoint, or checkpoint a tree without it'
_BPF = 'pin it (bpftool), close it before the checkpoint, and open it again by that path'
_OF_MACHINE = 'shut the virtual machine down, or save it by its own means'
_INTERFACE = 'make the interface persistent (ip tuntap), and close it before the checkpoint'
_OF_SESSION = 'checkpoint the programs of the session without its display server'
_HINTS = {
    **dict.fromkeys(('bpf-map', 'bpf-prog', 'bpf_link'), _BPF),
    **dict.fromkeys(('kvm', 'kvm-vm', 'kvm-vcpu'), _OF_MACHINE),
    **dict.fromkeys(('tun', 'macvtap'), _INTERFACE),
    **dict.fromkeys(('drm', 'input', 'hidraw'), _OF_SESSION),
    'fscontext': 'let the mount be made or given up first (fsmount)',
    'perf_event': 'end the measurement (perf, or a profiler in the program) first',
    'seccomp notify': 'checkpoint the supervised tree without its supervisor; its filters are refused too',
    'fuse': 'unmount the file system first, as requests of others are in its queue',
    'autofs': 'stop the automounter first, as mounts wait for its answers',
    'alsa': 'close the sound device first, or let a sound server have it',
    'rtc': 'close it first; an alarm that was set in it stays',
    'loop': 'detach the loop device first (losetup -d)',
}


class Unsupported(Kind[Struct], tag='unsupported'):
    """The last resort: the registry uses it when no other kind matches."""
    support = Support('all other files: other sockets, userfaultfd, '
                      'namespaces, BPF, perf events, KVM, devices', dumped='no', restored='no', refused='all')

    def matches(self, file: OpenFile) -> bool:
        return False

    def findings(self, file: OpenFile) -> list[Finding]:
        if stat.S_ISSOCK(file.stat.st_mode) and not file.is_path and self._tables.may_be_newer(file):
            return []       # it is looked at again when the tree is at rest
        name = _socket_name(file)
        hint = name.hint if name else _HINTS.get(_driver(file), '')
        return [finding('EOPNOTSUPP', f'{describe(file, self._tables)} ({file.link}) cannot be dumped yet',
                        hint or _CLOSE)]

    def dump(self, file: OpenFile, content: Content) -> NoReturn:
        reason = self.findings(file)[0]
        raise Refused(f'task {file.pid}: fd {file.fd}: {reason.reason}', errno=errno.EOPNOTSUPP, task=file.pid,
                      resource=f'fd {file.fd}', hint=reason.hint)

    def create(self, record: Struct, saved: SavedFile, ctx: RestoreContext) -> NoReturn:
        raise NotSupported(f'{saved.link}: no file of kind {saved.kind!r} can be opened again', resource=saved.link,
                           hint='use the ckptd that wrote the image, or a newer one')


def describe(file: OpenFile, tables: JobTables) -> str:
    """Describe a file for people: 'an io_uring', 'a listening IPv4 stream socket'."""
    if file.is_path:
        return 'an O_PATH reference'
    if file.link.startswith(_ANON):
        return _anon_inode(file.link)
    if file.magic in _BY_MAGIC:
        return _BY_MAGIC[file.magic]
    if on_shm_mount(file.stat):
        return 'a System V segment opened as a file'
    return _by_mode(file, tables)


def _driver(file: OpenFile) -> str:
    """Return the name of the part of the kernel that made the file, as in _HINTS."""
    if file.link.startswith(_ANON):
        return _anon_name(file.link).split(':')[0]
    mode = file.stat.st_mode
    return driver_of(mode, file.stat.st_rdev) if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else ''


def _anon_name(link: str) -> str:
    return link.removeprefix(_ANON).removeprefix('[').removesuffix(']')


def _anon_inode(link: str) -> str:
    name = _anon_name(link)
    return _ANON_INODES.get(name.split(':')[0], f'a file of the kernel named {name!r}')


def _by_mode(file: OpenFile, tables: JobTables) -> str:
    mode, device = file.stat.st_mode, file.stat.st_rdev
    if stat.S_ISSOCK(mode):
        return _socket(file, tables)
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        what = 'character' if stat.S_ISCHR(mode) else 'block'
        driver = driver_of(mode, device)
        return f'a {what} device {os.major(device)}:{os.minor(device)}' + (f' of the driver {driver}' if driver else '')
    return f'a file of unknown type {stat.S_IFMT(mode):#o}'


def _socket_name(file: OpenFile) -> FamilyName | None:
    """Return the name of a socket; None for another file, or one that we may not inspect."""
    if file.is_path or not stat.S_ISSOCK(file.stat.st_mode):
        return None
    with suppress(OSError), file.duplicate() as fd:
        return name_of(*arguments_of(fd))
    return None


def _socket(file: OpenFile, tables: JobTables) -> str:
    name = _socket_name(file)
    if name is None:        # the name is for people and not worth a failure
        return 'a socket'
    words = f'{"listening " if _is_listening(file) else ""}{name}'
    where = _unix_name(file.stat.st_ino, tables) if name.family == 'unix' else ''
    return f'{article(words)} {words}{where}'


def _is_listening(file: OpenFile) -> bool:
    with suppress(OSError), file.as_socket() as sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def _unix_name(inode: int, tables: JobTables) -> str:
    """Return ' bound to /run/x', ' connected to @abstract' or ''."""
    known = tables.unix_sockets     # without sock_diag: the same refusal with less information
    own = known.get(inode)
    if own is None:     # of another network namespace
        return ''
    peer = known.get(own.peer)
    if own.name:
        return f' bound to {_printable(own.name)}'
    return f' connected to {_printable(peer.name)}' if peer and peer.name else ''


def _printable(name: bytes) -> str:
    # an abstract name begins with NUL (unix(7)), and is shown as in ss(8) and netstat(8)
    return name.replace(b'\0', b'@').decode('utf-8', 'backslashreplace')
