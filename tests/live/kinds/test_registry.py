# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every kind is tried on every sort of open file: exactly one matches, or none and it is refused by its real name."""

import ctypes
import mmap
import os
import pty
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import Refused
from ckptd.kernel import families
from ckptd.kernel.shm import shmctl_remove
from ckptd.objects.files.base import FileEnd, OpenFile
from ckptd.objects.files.namespace import NamespaceFileKind
from ckptd.objects.files.other_sockets import article, name_of
from ckptd.objects.files.registry import Kinds
from ckptd.objects.files.tables import JobTables
from tests.lib.brood import Brood, libc
from tests.live.kinds.conftest import BY_TAG, kind_of

Opened = Callable[[Callable[[], int]], OpenFile]

CLONE_NEWNS, CLONE_NEWUTS = 0x00020000, 0x04000000       # <linux/sched.h>
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18                    # <linux/mount.h>
# <asm/unistd_64.h>
NR = {'userfaultfd': 323, 'bpf': 321, 'perf_event_open': 298, 'io_uring_setup': 425, 'memfd_secret': 447,
      'landlock_create_ruleset': 444, 'open_tree': 428, 'fsopen': 430, 'fsconfig': 431, 'fsmount': 432}
FSCONFIG_CMD_CREATE, OPEN_TREE_CLONE, AT_FDCWD = 6, 1, -100        # <linux/mount.h>, <linux/fcntl.h>


def fd_of(result: int) -> int:
    """The fd that a C function returned; the child fails, and its test with it, on -1."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def deleted_file() -> int:
    fd = os.open('gone', os.O_RDWR | os.O_CREAT)
    Path('gone').unlink()
    return fd


def message_queue() -> int:
    name = f'/ckptd-{os.getpid()}'.encode()
    fd = fd_of(libc.mq_open(name, os.O_RDWR | os.O_CREAT, 0o600, None))
    libc.mq_unlink(name)
    return fd


def named_fifo() -> int:
    os.mkfifo('fifo')
    return os.open('fifo', os.O_RDWR)


def symbolic_link() -> int:
    Path('link').symlink_to('nowhere')
    return os.open('link', os.O_PATH | os.O_NOFOLLOW)


def removed_directory() -> int:
    Path('directory').mkdir()
    fd = os.open('directory', os.O_RDONLY)
    Path('directory').rmdir()
    return fd


SUPPORTED: dict[str, tuple[str, Callable[[], int]]] = {
    'regular file': ('regular', lambda: os.open('file', os.O_RDWR | os.O_CREAT)),
    'deleted file': ('regular', deleted_file),
    'nameless file': ('regular', lambda: os.open('.', os.O_RDWR | os.O_TMPFILE)),
    'file named like a deleted one': ('regular', lambda: os.open('x (deleted)', os.O_RDWR | os.O_CREAT)),
    'file of proc': ('regular', lambda: os.open('/proc/self/status', os.O_RDONLY)),
    'directory': ('directory', lambda: os.open('.', os.O_RDONLY)),
    'message queue': ('mqueue', message_queue),
    'io_uring': ('io_uring', lambda: libc.syscall(NR['io_uring_setup'], 4, ctypes.create_string_buffer(120))),
    'fanotify': ('fanotify', lambda: libc.fanotify_init(0, 0)),
    'O_PATH': ('path', lambda: os.open('.', os.O_PATH)),
    'O_PATH of null': ('path', lambda: os.open('/dev/null', os.O_PATH)),
    'symbolic link': ('path', symbolic_link),
    'removed directory': ('directory', removed_directory),
    'null': ('chardev', lambda: os.open('/dev/null', os.O_RDWR)),
    'zero': ('chardev', lambda: os.open('/dev/zero', os.O_RDWR)),
    'full': ('chardev', lambda: os.open('/dev/full', os.O_RDWR)),
    'random': ('chardev', lambda: os.open('/dev/random', os.O_RDONLY)),
    'urandom': ('chardev', lambda: os.open('/dev/urandom', os.O_RDONLY)),
    'pipe, read end': ('pipe', lambda: os.pipe()[0]),
    'pipe, write end': ('pipe', lambda: os.pipe()[1]),
    'FIFO': ('fifo', named_fifo),
    'terminal': ('tty', lambda: pty.openpty()[1]),
    'master of a terminal': ('tty', lambda: pty.openpty()[0]),
    'memfd': ('memfd', lambda: os.memfd_create('x')),
    'memfd of huge pages': ('memfd', lambda: os.memfd_create('x', os.MFD_HUGETLB)),
    'anonymous memory': ('shmem', lambda: memory_as_file(mmap.mmap(-1, 4096))),
    'eventfd': ('eventfd', lambda: libc.eventfd(0, 0)),
    'semaphore eventfd': ('eventfd', lambda: libc.eventfd(1, 1)),
    'epoll': ('epoll', lambda: libc.epoll_create1(0)),
    'signalfd': ('signalfd', lambda: libc.signalfd(-1, ctypes.create_string_buffer(128), 0)),
    'timerfd': ('timerfd', lambda: libc.timerfd_create(1, 0)),
    'pidfd': ('pidfd', lambda: os.pidfd_open(os.getpid())),
    'inotify': ('inotify', lambda: libc.inotify_init1(0)),
    'namespace': ('namespace', lambda: os.open('/proc/self/ns/net', os.O_RDONLY)),
    'datagram socket': ('unix', lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()),
    'unconnected socket': ('unix', lambda: socket.socket(socket.AF_UNIX).detach()),
    'half of a seqpacket pair': ('unix', lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0].detach()),
    'socket that was shut down': ('unix', lambda: shut_down()),
    'netlink socket': ('netlink', lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).detach()),
    'TCP socket': ('tcp', lambda: socket.socket().detach()),
    'TCP listener': ('tcp', lambda: socket.create_server(('127.0.0.1', 0)).detach()),
    'MPTCP socket': ('tcp', lambda: socket.socket(proto=socket.IPPROTO_MPTCP).detach()),
    'UDP socket': ('udp', lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).detach()),
    'UDP-Lite socket': ('udp', lambda: socket.socket(type=socket.SOCK_DGRAM, proto=socket.IPPROTO_UDPLITE).detach()),
    'socket whose other end is gone': ('unix', lambda: socket.socketpair()[0].detach()),
    'bound socket': ('unix', lambda: abstract()[0].detach()),
    'connected socket': ('unix', lambda: connected()),
    'socket in a queue': ('unix', lambda: not_accepted()),
}


def abstract() -> tuple[socket.socket, str]:
    """A listening unix socket with an abstract name of this test's own."""
    name = f'\0ckptd-test-{os.getppid()}'
    server = socket.socket(socket.AF_UNIX)
    server.bind(name)
    server.listen()
    return server, name


def connected() -> int:
    """A socket that is connected to such a one."""
    server, name = abstract()
    client = socket.socket(socket.AF_UNIX)
    client.connect(name)
    server.accept()[0].detach()
    server.detach()
    return client.detach()


def not_accepted() -> int:
    """A socket that waits for a server to accept it: nobody has the other end, and it is not gone."""
    server, name = abstract()
    client = socket.socket(socket.AF_UNIX)
    client.connect(name)
    server.detach()
    return client.detach()


def shut_down() -> int:
    """A socket whose other end is open, and has shut both directions down."""
    one, other = socket.socketpair()
    other.shutdown(socket.SHUT_RDWR)
    other.detach()
    return one.detach()


def memory_as_file(memory: mmap.mmap) -> int:
    """Shared memory, opened by the link of its mapping."""
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return os.open(f'/proc/self/map_files/{at:x}-{at + len(memory):x}', os.O_RDWR)


def segment() -> int:
    """A System V segment, opened likewise. It is removed with this process."""
    shmid = libc.shmget(0, 4096, 0o600)
    libc.shmat.restype = ctypes.c_void_p
    at = libc.shmat(shmid, None, 0)
    shmctl_remove(shmid)
    return os.open(f'/proc/self/map_files/{at:x}-{at + 4096:x}', os.O_RDWR)


def bpf_program() -> int:
    """A filter of sockets that returns 0: BPF_PROG_LOAD of two instructions (bpf(2))."""
    code = ctypes.create_string_buffer(bytes((0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0)), 16)
    license_name = ctypes.create_string_buffer(b'GPL')
    attributes = struct.pack('=2I2Q', 1, 2, ctypes.addressof(code), ctypes.addressof(license_name)) + bytes(96)
    return fd_of(libc.syscall(NR['bpf'], 5, attributes, len(attributes)))


REFUSED: dict[str, tuple[str, Callable[[], int]]] = {
    'userfaultfd': ('a userfaultfd', lambda: libc.syscall(NR['userfaultfd'], 0)),
    'BPF map': ('a BPF map', lambda: libc.syscall(NR['bpf'], 0, struct.pack('5I', 2, 4, 4, 1, 0) + bytes(64), 72)),
    'BPF program': ('a BPF program', lambda: bpf_program()),
    'perf event': ('a perf event', lambda: libc.syscall(NR['perf_event_open'],
                                                        struct.pack('2IQ', 1, 128, 0) + bytes(112), 0, -1, -1, 0)),
    'Landlock ruleset': ('a Landlock ruleset',
                         lambda: libc.syscall(NR['landlock_create_ruleset'], b'\1' + bytes(7), 8, 0)),
    'secret memory': ('secret memory', lambda: libc.syscall(NR['memfd_secret'], 0)),
    'file system context': ('a file system context', lambda: libc.syscall(NR['fsopen'], b'tmpfs', 0)),
    'tun': ('a character device 10:200 of the driver tun', lambda: os.open('/dev/net/tun', os.O_RDWR)),
    'fuse': ('a character device 10:229 of the driver fuse', lambda: os.open('/dev/fuse', os.O_RDWR)),
    'autofs': ('a character device 10:235 of the driver autofs', lambda: os.open('/dev/autofs', os.O_RDONLY)),
    'kvm': ('a character device 10:232 of the driver kvm', lambda: os.open('/dev/kvm', os.O_RDWR)),
    'O_PATH of a pipe': ('an O_PATH reference', lambda: os.open(f'/proc/self/fd/{os.pipe()[0]}', os.O_PATH)),
    'O_PATH of a memfd': ('an O_PATH reference', lambda: os.open(f'/proc/self/fd/{os.memfd_create("x")}', os.O_PATH)),
    'device': ('a character device 1:11 of the driver mem', lambda: os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)),
    'segment as a file': ('a System V segment opened as a file', lambda: segment()),
}


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(('tag', 'work'), SUPPORTED.values(), ids=SUPPORTED)
def test_exactly_one_kind_matches(opened: Opened, tag: str, work: Callable[[], int]) -> None:
    file = opened(work)
    assert [kind.tag for kind in Kinds().by_tag.values() if kind.matches(file)] == [tag]
    assert kind_of(file).tag == tag
    assert not [reason for reason in kind_of(file).findings(file) if reason.severity == 'refusal']


@pytest.mark.parametrize(('name', 'work'), REFUSED.values(), ids=REFUSED)
def test_what_no_kind_matches_is_refused_by_its_name(opened: Opened, name: str, work: Callable[[], int],
                                                     request: pytest.FixtureRequest) -> None:
    def run() -> int:
        try:
            return fd_of(work())
        except OSError:
            return -1       # this kernel lacks it, or we lack the right
    file = opened_or_skip(opened, run)
    assert [kind.tag for kind in Kinds().by_tag.values() if kind.matches(file)] == []
    assert kind_of(file).tag == 'unsupported'
    assert Kinds().unsupported.findings(file)[0].reason.startswith(name)
    with pytest.raises(Refused) as caught:
        Kinds().unsupported.dump(file, None)    # type: ignore[arg-type]
    assert (caught.value.task, caught.value.resource) == (file.pid, f'fd {file.fd}')
    assert file.link in caught.value.message


def in_new_mount() -> int:
    """A file of a file system that is mounted nowhere."""
    context = fd_of(libc.syscall(NR['fsopen'], b'tmpfs', 0))
    fd_of(libc.syscall(NR['fsconfig'], context, FSCONFIG_CMD_CREATE, None, None, 0))
    mount = fd_of(libc.syscall(NR['fsmount'], context, 0, 0))
    return os.open('new', os.O_RDWR | os.O_CREAT, dir_fd=mount)


@pytest.mark.needs('root')
@pytest.mark.parametrize('work', [lambda: fd_of(libc.syscall(NR['open_tree'], AT_FDCWD, b'.', OPEN_TREE_CLONE)),
                                  in_new_mount], ids=['open_tree', 'fsmount'])
def test_mounts_without_a_place(opened: Opened, work: Callable[[], int]) -> None:
    """Their paths would lead to other files."""
    file = opened(work)
    [row] = kind_of(file).findings(file)
    assert (row.errno, row.severity) == ('EOPNOTSUPP', 'refusal')
    assert 'of a mount that is not attached' in row.reason


def pipe_of_autofs() -> int:
    """The end of an automounter's pipe that it reads."""
    fd_of(libc.unshare(CLONE_NEWNS))
    fd_of(libc.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None))
    reader, writer = os.pipe2(os.O_DIRECT)
    Path('automount').mkdir()
    options = f'fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct'
    fd_of(libc.mount(b'test', b'automount', b'autofs', 0, options.encode()))
    os.close(writer)
    return reader


@pytest.mark.needs('root')
def test_the_pipe_of_an_automounter(opened: Opened) -> None:
    file = opened(pipe_of_autofs)
    kind = kind_of(file)
    endpoint = kind.endpoint(file)
    assert endpoint is not None
    [(_, row)] = kind.link([FileEnd(file, endpoint)], is_whole=True)
    assert (row.errno, row.severity) == ('EOPNOTSUPP', 'refusal')
    assert 'autofs' in row.reason
    assert 'automounter' in row.hint


def test_a_driver_has_a_hint(opened: Opened) -> None:
    file = opened_or_skip(opened, lambda: os.open('/dev/net/tun', os.O_RDWR))
    assert 'make the interface persistent' in Kinds().unsupported.findings(file)[0].hint


# arguments of socket(2): how the refusal begins, and a part of its hint
OTHER_SOCKETS = {
    (40, socket.SOCK_STREAM, 0): ('a vsock stream socket', 'in another machine'),
    (40, socket.SOCK_SEQPACKET, 0): ('a vsock seqpacket socket', 'in another machine'),
    (38, socket.SOCK_SEQPACKET, 0): ('an AF_ALG (kernel crypto) seqpacket socket', 'keys'),
    (44, socket.SOCK_RAW, 0): ('an XDP raw socket', 'queue of a device'),
    (41, socket.SOCK_DGRAM, 0): ('a KCM datagram socket', 'SIOCKCMUNATTACH'),
    (43, socket.SOCK_STREAM, 0): ('an SMC stream socket', 'smc_run'),
    (socket.AF_INET, socket.SOCK_STREAM, 256): ('an SMC stream socket', 'smc_run'),
    (socket.AF_INET, socket.SOCK_STREAM, 132): ('an SCTP stream socket', 'use TCP'),
    (socket.AF_INET6, socket.SOCK_SEQPACKET, 132): ('an SCTP seqpacket socket', 'use TCP'),
    (socket.AF_INET, 6, 33): ('a DCCP type 6 socket', 'use TCP'),
    (socket.AF_INET, socket.SOCK_DGRAM, 115): ('an L2TP datagram socket', 'ip l2tp'),
    (31, socket.SOCK_RAW, 1): ('a Bluetooth raw socket', 'in a device'),
    (29, socket.SOCK_RAW, 1): ('a CAN raw socket', 'in a device'),
    (30, socket.SOCK_RDM, 0): ('a TIPC reliable datagram socket', 'use TCP'),
    (21, socket.SOCK_SEQPACKET, 0): ('an RDS seqpacket socket', 'use TCP'),
    (24, socket.SOCK_STREAM, 0): ('a PPPoX stream socket', 'poff'),
    (15, socket.SOCK_RAW, 2): ('a PF_KEY (IPsec) raw socket', 'XFRM'),
}


def test_the_numbers_of_families_are_those_of_python() -> None:
    ours = {name: value for name, value in vars(families).items() if name.startswith('AF_')}
    theirs = {name: int(getattr(socket, name)) for name in ours if hasattr(socket, name)}
    assert len(theirs) > 10
    assert theirs == {name: ours[name] for name in theirs}


@pytest.mark.parametrize('arguments', OTHER_SOCKETS, ids=lambda one: '-'.join(map(str, map(int, one))))
def test_names_of_other_sockets(arguments: tuple[int, int, int]) -> None:
    """What is said of a socket, whether this kernel has the family or not."""
    begin, hint = OTHER_SOCKETS[arguments]
    name = name_of(*arguments)
    assert f'{article(str(name))} {name}' == begin
    assert hint in name.hint


@pytest.mark.parametrize('arguments', OTHER_SOCKETS, ids=lambda one: '-'.join(map(str, map(int, one))))
def test_sockets_of_other_families_are_refused_by_name(opened: Opened, arguments: tuple[int, int, int]) -> None:
    begin, hint = OTHER_SOCKETS[arguments]
    try:
        socket.socket(*arguments).close()
    except OSError as error:
        pytest.skip(f'this kernel or user has no {name_of(*arguments)}: {error.strerror}')
    file = opened(lambda: socket.socket(*arguments).detach())
    assert kind_of(file).tag == 'unsupported'
    [row] = kind_of(file).findings(file)
    assert row.reason == f'{begin} ({file.link}) cannot be dumped yet'
    assert hint in row.hint


def test_a_listening_socket_of_another_family_is_said_to_listen(opened: Opened) -> None:
    def listen() -> int:
        one = socket.socket(40, socket.SOCK_STREAM)
        one.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        one.listen()
        return one.detach()
    try:
        socket.socket(40, socket.SOCK_STREAM).close()
    except OSError as error:
        pytest.skip(f'this kernel has no vsock: {error.strerror}')
    file = opened(listen)
    assert kind_of(file).findings(file)[0].reason.startswith('a listening vsock stream socket')


@pytest.mark.needs('root')
def test_a_namespace_outside_of_the_tree(opened: Opened, brood: Brood) -> None:
    """It is refused by its name; that of process 1 is not."""
    stranger = brood.fork(lambda: libc.unshare(CLONE_NEWUTS))
    [row] = NamespaceFileKind(JobTables()).findings(opened(lambda: os.open(f'/proc/{stranger}/ns/uts', os.O_RDONLY)))
    assert (row.errno, row.severity) == ('EOPNOTSUPP', 'refusal')
    assert 'outside of the tree' in row.reason


def opened_or_skip(opened: Opened, work: Callable[[], int]) -> OpenFile:
    try:
        return opened(work)
    except FileNotFoundError:
        pytest.skip('this kernel or user cannot make one')


def test_tags_are_the_formats_for_ever() -> None:
    """An image says 'pipe' and means PipeKind. A tag may be added, never changed."""
    assert {'chardev', 'directory', 'epoll', 'eventfd', 'fifo', 'memfd', 'pipe', 'regular', 'signalfd', 'timerfd',
            'tty', 'unix', 'path',
            'pidfd'} <= BY_TAG.keys()
    assert all(kind.tag == tag for tag, kind in BY_TAG.items())


def test_O_PATH_of_what_has_a_kind_is_none(opened: Opened) -> None:
    def work() -> int:
        return os.open(f'/proc/self/fd/{libc.eventfd(0, 0)}', os.O_PATH)
    assert kind_of(opened(work)).tag == 'unsupported'
