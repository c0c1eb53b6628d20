# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an ordinary user's image claims of files: owners, paths, signals, leases, sizes. A restart gives the user no
more than the user has, whatever the worker may do."""

import dataclasses
import fcntl
import os
import resource
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from ckptd.errors import CkptError, Finding
from ckptd.image import records as r
from ckptd.image.grammar import Struct
from ckptd.image.reader import ImageReader
from ckptd.kernel.shm import shmctl_remove, shmctl_stat
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2
from ckptd.objects.files.base import InheritedFiles
from ckptd.objects.files.content import ContentSegment
from ckptd.objects.files.locks import EOF, LEASE, Lock
from ckptd.objects.files.open_file import F_GETOWNER_UIDS, read_open_file
from ckptd.objects.files.registry import BY_TAG
from ckptd.operation.context import JobContext
from ckptd.protocol.channel import Channel
from ckptd.protocol.requests import Caller
from ckptd.restore.checks import capacity
from ckptd.restore.checks.capacity import inherited_bytes, most_to_fill, parse_meminfo
from ckptd.restore.file_access import FileAccess
from ckptd.restore.files import set_owner_of_signals
from ckptd.restore.prepare import prepare
from tests.lib import settled
from tests.lib.altered import alter, rewrite
from tests.lib.brood import Brood, libc
from tests.lib.victim import Victim
from tests.live.kinds.test_rollback import CLONE_NEWNS, MS_PRIVATE, MS_REC
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, me, place_of
from tests.worker.test_owners import end
from tests.worker.test_restore_checks import about, checked, found, importer
from tests.worker.test_spool_failures import mounted

__all__ = ['importer']      # a fixture: an ordinary user with a process that asks

pytestmark = pytest.mark.needs('root', 'ptrace', 'gcc')

MIB = 1 << 20
PYTHON = '/usr/bin/python3'     # the interpreter of the checkout may be where nobody else can read it
PRELUDE = """
import fcntl, mmap, os, signal, struct, time
def done():
    os.dup2(os.open('/dev/null', os.O_RDWR), 1)
    while True: time.sleep(1000)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """The user's own directory."""
    with place_of(ORDINARY_UID) as path:
        yield path


Image = Callable[..., Path]


@pytest.fixture
def image_of(place: Place, home: Path, importer: Caller) -> Iterator[Image]:
    """image_of(program): the image of a process of the user's that has run those lines of Python; it is dead. Further
    arguments: fields of the request."""
    running: list[subprocess.Popen[bytes]] = []

    def make(program: str, **more: object) -> Path:
        process = subprocess.Popen(
            [PYTHON, '-I', '-c', f'{PRELUDE}\n{program}\ndone()'], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=home, start_new_session=True, user=ORDINARY_UID, group=ORDINARY_UID,
            extra_groups=[ORDINARY_UID])
        running.append(process)
        assert process.stdout is not None
        process.stdout.read()       # its end: all is prepared
        image = place.checkpoint(process.pid, after='kill', caller=importer, **more)
        process.wait()
        settled.reap_orphans()
        return image
    yield make
    for one in running:
        if one.stdout is not None:
            one.stdout.close()
        if one.poll() is None:
            one.kill()
            one.wait()


def claim(image: Path, tag: str, change: Callable[[Any], Struct] = lambda record: record, **fields: object) -> None:
    """Change what the kind `tag` wrote of its files, and other fields of their records."""
    def altered(saved: r.SavedFile) -> r.SavedFile:
        if saved.kind != tag:
            return saved
        record = change(BY_TAG[tag].record.decode(saved.data))
        return dataclasses.replace(saved, data=record.encode(), **fields)  # type: ignore[arg-type]
    rewrite(image, r.SavedFile, altered)


def restored(place: Place, image: Path, caller: Caller, **more: object) -> int:
    with DirectWorker() as worker:
        return int(worker.run(place.request(0, operation='restore', image=image.name, caller=caller,
                                            **more))['root'])


def warned(rows: list[Finding], word: str) -> Finding:
    [row] = [row for row in rows if word in row.reason]
    assert (row.severity, bool(row.hint)) == ('warning', True)
    return row


def refused(place: Place, image: Path, caller: Caller, **more: object) -> Finding:
    """The one thing that is in the way, by a dry run and by a restore alike."""
    [row] = [row for row in checked(place, image, caller=caller, **more) if row.severity == 'refusal']
    assert row.hint
    with DirectWorker() as worker, pytest.raises(CkptError) as caught:
        worker.run(place.request(0, operation='restore', image=image.name, caller=caller, **more))
    # how much memory is left changes in between
    assert [(one.pid, one.resource, one.errno, one.hint) for one in caught.value.refusals
            if one.severity == 'refusal'] == [(row.pid, row.resource, row.errno, row.hint)]
    assert not place.freezes
    return row


# ---------------------------------------------------------------- owners

FILES = """
os.mkfifo('fifo'); os.open('fifo', os.O_RDWR); os.unlink('fifo')
gone = os.open('gone', os.O_RDWR | os.O_CREAT, 0o600); os.write(gone, b'#!/bin/sh'); os.unlink('gone')
os.pipe()
plain = os.memfd_create('plain'); os.write(plain, b'x')
mapped = os.memfd_create('mapped'); os.ftruncate(mapped, 4096); keep = mmap.mmap(mapped, 4096); keep[0] = 1
"""


def files_without_a_name(pid: int) -> list[os.stat_result]:
    found = [os.stat(path) for path in Path(f'/proc/{pid}/fd').iterdir()]  # noqa: PTH116
    return [of for of in found if not stat.S_ISCHR(of.st_mode)]


def test_files_are_not_given_to_somebody_else(place: Place, image_of: Image, importer: Caller) -> None:
    """A user's image says that they are root's programs with set-user-ID; by what the user may do they are not."""
    image = image_of(FILES)
    for tag in ('fifo', 'regular', 'memfd'):
        claim(image, tag, lambda one: dataclasses.replace(one, uid=0, gid=0, mode=stat.S_IFMT(one.mode) | 0o6755),
              mode=stat.S_IFIFO | 0o6755)
    claim(image, 'pipe', lambda one: dataclasses.replace(one, uid=0, gid=0), mode=stat.S_IFIFO | 0o6755)
    alter(image, r.SharedMemory, uid=0, gid=0, mode=stat.S_IFREG | 0o6755)
    rows = found(place, image, caller=importer)
    for name in ('fifo belonged', 'gone belonged', 'pipe:[', 'memfd plain', 'memfd mapped'):
        assert f'uid {ORDINARY_UID}' in warned(rows, name).reason
    pid = restored(place, image, importer)
    try:
        files = files_without_a_name(pid)
        assert len(files) == 7      # mmap.mmap has its own fd of the mapped one
        assert {(of.st_uid, of.st_gid, stat.S_IMODE(of.st_mode)) for of in files} == {
            (ORDINARY_UID, ORDINARY_UID, 0o755)}
    finally:
        end(pid)


@pytest.mark.parametrize('owner', [{'uid': 0}, {'gid': 0}, {'uid': 0, 'gid': 0}], ids=str)
def test_no_segment_is_made_for_somebody_else(place: Place, image_of: Image, importer: Caller, owner: dict[str, int]
                                              ) -> None:
    """Of System V, under a key that root's programs may look for."""
    image = image_of('import ctypes; libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p\n'
                     'number = libc.shmget(0x434b5054, 4096, 0o1600); libc.shmat(number, None, 0)')
    with ImageReader(image) as reader:
        [shmid] = [one.shmid for one in reader.every(r.SharedMemory) if one.kind == r.SYSV]
    shmctl_remove(shmid)
    assert found(place, image, caller=importer) == []
    alter(image, r.SharedMemory, **owner)
    row = refused(place, image, importer)
    assert (row.resource, row.errno) == (f'shmid {shmid}', 'EPERM')
    with pytest.raises(OSError, match='shmctl'):
        shmctl_stat(shmid)


def test_no_segment_of_huge_pages_is_made_by_just_anybody(place: Place, image_of: Image, importer: Caller) -> None:
    image = image_of('import ctypes; libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p\n'
                     'number = libc.shmget(0, 4096, 0o1600); libc.shmat(number, None, 0)')
    with ImageReader(image) as reader:
        [shmid] = [one.shmid for one in reader.every(r.SharedMemory) if one.kind == r.SYSV]
    shmctl_remove(shmid)
    alter(image, r.SharedMemory, huge=2 << 20)
    rows = [row for row in found(place, image, caller=importer) if row.resource == f'shmid {shmid}']
    assert [row.errno for row in rows] == ['EPERM']


def test_a_file_of_a_dead_process_that_only_root_may_open(place: Place, image_of: Image, importer: Caller) -> None:
    image = image_of('import signal; pid = os.fork(); pid or signal.pause()\n'
                     "fd = os.open(f'/proc/{pid}/status', 0); os.kill(pid, 9); os.waitpid(pid, 0)")
    assert found(place, image, caller=importer) == []
    claim(image, 'dead', lambda one: dataclasses.replace(one, mode=stat.S_IFREG | 0o400))
    row = refused(place, image, importer)
    assert row.errno == 'EACCES'


def test_huge_pages_of_an_odd_size(place: Place, image_of: Image, importer: Caller) -> None:
    image = image_of(MEMORY)
    alter(image, r.SharedMemory, huge=3 << 20)
    row = refused(place, image, importer)
    assert (row.resource, row.errno) == ('memory', 'EINVAL')


@pytest.mark.parametrize('saved', [True, False], ids=['put back', 'cut back'])
def test_a_rollback_writes_as_the_user_does(place: Place, home: Path, image_of: Image, importer: Caller, saved: bool
                                            ) -> None:
    """Whoever may write root's program and is not root takes its set-user-ID away by that."""
    tool = home / 'tool'
    tool.write_bytes(b'#!/bin/sh')
    tool.chmod(0o4777)
    image = image_of("file = os.open('tool', os.O_RDWR)", save_files=saved)
    with tool.open('ab') as file:
        file.write(b' and more')
    tool.chmod(0o4777)
    end(restored(place, image, importer, changed_files='rollback'))
    assert tool.read_bytes() == b'#!/bin/sh'
    assert (tool.stat().st_uid, stat.S_IMODE(tool.stat().st_mode)) == (0, 0o777)


def test_files_come_back_as_the_users_own(place: Place, image_of: Image, importer: Caller) -> None:
    """Nothing is lost of what the user may give: no warning, and set-user-ID for the user stays."""
    image = image_of(f'{FILES}\nos.fchmod(gone, 0o4700)')
    assert found(place, image, caller=importer) == []
    pid = restored(place, image, importer)
    try:
        assert sorted(stat.S_IMODE(of.st_mode) for of in files_without_a_name(pid)) == [
            0o600, 0o600, 0o644, 0o777, 0o777, 0o777, 0o4700]
        assert {of.st_uid for of in files_without_a_name(pid)} == {ORDINARY_UID}
    finally:
        end(pid)


# ---------------------------------------------------------------- paths

OPEN = "file = os.open('/etc/passwd', os.O_RDONLY)"


def put_path(image: Path, path: str, flags: int = os.O_RDONLY) -> None:
    """The file that the program OPEN has open is said to be this one."""
    claim(image, 'regular', lambda one: dataclasses.replace(one, path=path), flags=flags, position=0)


WAYS = ['/proc/self/maps', '/proc/thread-self/maps', '/proc/self/task', '/proc/self/cwd/etc/passwd',
        '/proc/self/exe', '/dev/fd/0', 'link']


@pytest.mark.parametrize('way', WAYS)
def test_a_path_does_not_lead_to_the_worker(place: Place, home: Path, image_of: Image, importer: Caller, way: str
                                            ) -> None:
    image = image_of(OPEN)
    (home / 'link').symlink_to('/proc/self/maps')
    path = str(home / 'link') if way == 'link' else way
    put_path(image, path)
    row = refused(place, image, importer, changed_files='accept')
    assert (row.errno, row.reason.startswith(f'{path} is not opened: ')) == ('EACCES', True)


@pytest.mark.parametrize('way', [*WAYS[:-1], '/proc/PID/maps'])
def test_no_path_is_opened_that_leads_to_the_worker(place: Place, image_of: Image, importer: Caller, way: str) -> None:
    """What the plan has seen may be another thing when it is opened."""
    with ImageReader(image_of(OPEN)) as reader:
        access = FileAccess(reader, importer, 'accept', -1, InheritedFiles(()))
        with pytest.raises(PermissionError, match='it leads '):
            access.open(way.replace('PID', str(os.getpid())), os.O_RDONLY)


def test_no_path_is_opened_by_another_thread_of_the_worker(place: Place, image_of: Image, importer: Caller) -> None:
    """/proc/TID is there for each thread, and a thread may look at all of its process."""
    go, tids = threading.Event(), []

    def run() -> None:
        tids.append(threading.get_native_id())
        started.set()
        go.wait()
    started, thread = threading.Event(), threading.Thread(target=run)
    image = image_of(OPEN)
    thread.start()
    started.wait()
    try:
        with ImageReader(image) as reader, pytest.raises(PermissionError, match='ckptd itself'):
            FileAccess(reader, me(), 'accept', -1, InheritedFiles(())).open(f'/proc/{tids[0]}/maps', os.O_RDONLY)
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize(('cls', 'fields', 'resource'), [
    (r.Fs, {'cwd': '/proc/self'}, 'cwd'), (r.Fs, {'cwd': '/proc/self/root/tmp'}, 'cwd'),
    (r.Backing, {'path': '/proc/self/exe'}, 'exe')])
def test_directories_and_mapped_files_do_not_lead_to_the_worker(
        place: Place, image_of: Image, importer: Caller, cls: type[r.Record], fields: dict[str, object], resource: str
        ) -> None:
    image = image_of(OPEN)
    alter(image, cls, **fields)
    rows = [row for row in found(place, image, caller=importer, changed_files='accept')
            if 'is not opened: ' in row.reason]
    assert [row.errno for row in rows] == ['EACCES']
    assert rows[0].resource.startswith((resource, 'vma'))


@pytest.mark.parametrize(('way', 'flags', 'allowed'), [
    ('/proc/cpuinfo', os.O_RDONLY, True), ('/proc/sys/kernel/core_pattern', os.O_RDONLY, True),
    ('/proc/sys/kernel/core_pattern', os.O_RDWR, False), ('/proc/sys/kernel/core_pattern', os.O_WRONLY, False),
    ('/proc/PID/maps', os.O_RDONLY, True), ('/proc/1/status', os.O_RDONLY, True), ('/proc/1/maps', os.O_RDONLY, False)])
def test_what_of_proc_a_user_opens(place: Place, image_of: Image, importer: Caller, way: str, flags: int, allowed: bool
                                   ) -> None:
    """PID: a process of that user, which is not of the tree."""
    path = way.replace('PID', str(importer.pid))
    with ImageReader(image_of(OPEN)) as reader:
        access = FileAccess(reader, importer, 'accept', -1, InheritedFiles(()))
        if allowed:
            os.close(access.open(path, flags))
        else:
            with pytest.raises(PermissionError):
                access.open(path, flags)


def test_an_open_sysctl_is_not_handed_out(place: Place, image_of: Image, importer: Caller) -> None:
    """Root's effective uid may open it for writing."""
    image = image_of(OPEN)
    put_path(image, '/proc/sys/kernel/core_pattern', os.O_RDWR)
    with DirectWorker() as worker, pytest.raises(CkptError, match='cannot be read and written'):
        worker.run(place.request(0, operation='restore', image=image.name, caller=importer,
                                 changed_files='accept'))


def test_another_mount_of_proc_is_not_ours(place: Place, home: Path, image_of: Image, importer: Caller) -> None:
    """Its numbers are other processes, or the same by a name that says nothing of that."""
    image = image_of(OPEN)

    def look() -> list[str]:
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b'proc', str(home).encode(), b'proc', 0, None) == 0
        said = []
        with ImageReader(image) as reader:
            access = FileAccess(reader, importer, 'accept', -1, InheritedFiles(()))
            for name in ('self/maps', f'{importer.pid}/maps', 'cpuinfo'):
                try:
                    os.close(access.open(f'{home}/{name}', os.O_RDONLY))
                    said.append('')
                except PermissionError as error:
                    said.append(str(getattr(error, 'reason', error)))
        return said
    with Brood() as brood:
        *refused_, allowed = brood.ask(look)[1]
    assert refused_ == ['it leads to a process of another mount of /proc'] * 2
    assert allowed == ''


def test_the_number_of_a_process_that_has_another_one_here(place: Place, image_of: Image, importer: Caller) -> None:
    """In a new pid namespace: process 7 of the tree is not our process 7."""
    number = importer.pid
    with ImageReader(image_of(OPEN)) as reader:
        access = FileAccess(reader, importer, 'accept', -1, InheritedFiles(()))
        os.close(access.open(f'/proc/{number}/status', os.O_RDONLY))
        access._pids = {number: number + 1}
        with pytest.raises(PermissionError, match='has another pid here'):
            access.open(f'/proc/{number}/status', os.O_RDONLY)


def test_a_rollback_leaves_files_alone_that_are_made_up(place: Place, image_of: Image, importer: Caller) -> None:
    """What the user may write is not written by us: another's task, which the kernel asks for its rights."""
    image = image_of("file = os.open('file', os.O_RDWR | os.O_CREAT); os.write(file, b'x' * 100)", save_files=True)
    put_path(image, f'/proc/{importer.pid}/comm', os.O_RDWR)
    claim(image, 'regular', lambda one: dataclasses.replace(one, size=0, saved=()))
    with DirectWorker() as worker, pytest.raises(CkptError, match='without stored content'):
        worker.run(place.request(0, operation='restore', image=image.name, caller=importer,
                                 changed_files='rollback'))


# ---------------------------------------------------------------- signals, leases, timers, addresses

SIGIO = """
pid, group = os.getpid(), 2
pair = os.pipe()
fcntl.fcntl(pair[0], 10, 9)                                     # F_SETSIG: SIGKILL
fcntl.fcntl(pair[0], 15, struct.pack('ii', group, pid))         # F_SETOWN_EX
fcntl.fcntl(pair[0], fcntl.F_SETFL, os.O_ASYNC)
"""


@pytest.mark.parametrize('uids', [(0, 0), (ORDINARY_UID, 0), (0, ORDINARY_UID), (1234, 1234)])
def test_signals_are_not_sent_by_the_rights_of_others(place: Place, image_of: Image, importer: Caller,
                                                      uids: tuple[int, int]) -> None:
    """Or SIGIO kills root's process."""
    image = image_of(SIGIO)
    assert found(place, image, caller=importer) == []
    rewrite(image, r.SavedFile, lambda one: dataclasses.replace(
        one, owner_uid=uids[0], owner_euid=uids[1]) if one.owner else one)
    row = refused(place, image, importer)
    assert (row.errno, 'F_SETOWN' in row.reason) == ('EPERM', True)


def test_signals_are_sent_by_the_users_own_rights(place: Place, image_of: Image, importer: Caller) -> None:
    """Also where the image says something else, and nobody has looked at it."""
    image = image_of(SIGIO)
    pid = restored(place, image, importer)
    try:
        assert owner_uids(pid) == {(ORDINARY_UID, ORDINARY_UID)}
    finally:
        end(pid)
    read, write = os.pipe()
    for name, uid in (('root', 0), ('another', 1234)):
        set_owner_of_signals(read, r.SavedFile(1, name, 0, 0, 0, 1, 1, 0, '', b'', uid, uid), os.getpid(), importer.uid)
        assert fcntl.fcntl(read, F_GETOWNER_UIDS, bytes(8)) == struct.pack('II', *[ORDINARY_UID] * 2)
    os.close(read)
    os.close(write)


def owner_uids(pid: int) -> set[tuple[int, int]]:
    """Of those of its open files that have an owner."""
    owners = [read_open_file(pid, int(path.name)).owner() for path in Path(f'/proc/{pid}/fd').iterdir()]
    return {(one.uid, one.euid) for one in owners if one.pid}


@pytest.mark.parametrize('write', [0, 1], ids=['read', 'write'])
def test_a_lease_is_the_owners_to_take(place: Place, image_of: Image, importer: Caller, write: int) -> None:
    """Who opens a leased file waits for its holder, root's programs too."""
    image = image_of(OPEN)
    lease = Lock(LEASE, write, 0, EOF, 0)
    claim(image, 'regular', lambda one: dataclasses.replace(one, locks=(lease,)))
    row = refused(place, image, importer)
    assert (row.errno, row.reason.startswith('/etc/passwd is leased')) == ('EACCES', True)
    own = image_of("file = os.open('own', os.O_RDONLY | os.O_CREAT)")
    claim(own, 'regular', lambda one: dataclasses.replace(one, locks=(Lock(LEASE, 0, 0, EOF, 0),)))
    pid = restored(place, own, importer)
    try:
        assert 'LEASE' in Path(f'/proc/{pid}/fdinfo/3').read_text()
    finally:
        end(pid)


def test_a_lease_on_a_directory_is_its_owners_too(place: Place, image_of: Image, importer: Caller) -> None:
    image = image_of("directory = os.open('/etc', os.O_RDONLY)")
    claim(image, 'directory', lambda one: dataclasses.replace(one, locks=(Lock(LEASE, 0, 0, EOF, 0),)))
    assert refused(place, image, importer).errno == 'EACCES'


TIMERS = """
import ctypes
libc = ctypes.CDLL(None)
libc.timerfd_create(7, 0)
event, timer = (ctypes.c_int * 16)(0, 0, 10, 0), ctypes.c_void_p()
libc.timer_create(7, event, ctypes.byref(timer))
"""


@pytest.mark.parametrize('clock', [8, 9])
def test_clocks_that_wake_the_machine(place: Place, image_of: Image, importer: Caller, clock: int) -> None:
    image = image_of(TIMERS)
    assert found(place, image, caller=importer) == []
    claim(image, 'timerfd', lambda one: dataclasses.replace(one, clock=clock))
    assert 'CAP_WAKE_ALARM' in refused(place, image, importer).reason
    rewrite(image, r.PosixTimers, lambda one: dataclasses.replace(
        one, timers=tuple(dataclasses.replace(timer, clock=clock) for timer in one.timers)))
    rows = [row for row in found(place, image, caller=importer) if 'CAP_WAKE_ALARM' in row.reason]
    assert [(row.resource.split()[0], row.errno) for row in rows] == [('fd', 'EPERM'), ('timer', 'EPERM')]
    assert not [row for row in found(place, image) if 'CAP_WAKE_ALARM' in row.reason]       # asked by root


def test_no_mapping_at_the_null_pointer(place: Place, image_of: Image, importer: Caller) -> None:
    """vm.mmap_min_addr is for users, and stubs map as root."""
    image = image_of('memory = mmap.mmap(-1, 1 << 20); memory[0] = 1')
    assert found(place, image, caller=importer) == []
    with ImageReader(image) as reader:
        lowest = min(reader.every(r.Vma), key=lambda vma: vma.start)
    # the lowest one is the program, which is a file's; nothing stands below it
    rewrite(image, r.Vma, lambda vma: dataclasses.replace(
        vma, start=0, end=vma.end - vma.start) if vma == lowest else vma)
    rewrite(image, r.PageRuns, lambda one: dataclasses.replace(one, runs=tuple(
        dataclasses.replace(run, start=run.start - lowest.start) if lowest.start <= run.start < lowest.end else run
        for run in one.runs)))
    row = refused(place, image, importer)
    assert (row.errno, row.resource.startswith('vma 0-')) == ('EPERM', True)
    assert 'vm.mmap_min_addr' in row.reason
    assert not [row for row in found(place, image) if 'mmap_min_addr' in row.reason]


# ---------------------------------------------------------------- room

MEMORY = """
memory = mmap.mmap(-1, 1 << 20); memory[:] = bytes([65]) * (1 << 20)
plain = os.memfd_create('plain'); os.write(plain, bytes([66]) * (1 << 20))
"""


def repeated(image: Path, times: int, start: int = 0) -> None:
    """The 1 MiB of the shared mapping is there many times, of one piece of data."""
    with ImageReader(image) as reader:
        [shared] = [one for one in reader.every(r.SharedMemory) if one.kind == r.SHMEM]
        [run] = reader.shared_runs(shared.shm_id)
    alter_one(image, r.SharedMemory, shared, size=times * MIB)
    rewrite(image, r.PageRuns, lambda one: dataclasses.replace(one, runs=tuple(
        dataclasses.replace(run, start=at * MIB) for at in range(times)))
        if (one.owner_kind, one.owner) == (r.OF_SHARED_MEMORY, shared.shm_id) else one)


def alter_one(image: Path, cls: type[r.Record], record: r.Record, **fields: object) -> None:
    rewrite(image, cls,
            lambda one: dataclasses.replace(one, **fields) if one == record else one)  # type: ignore[type-var]


def left() -> int:
    """MiB of memory that the machine has left, swap included."""
    info = parse_meminfo(Path('/proc/meminfo').read_bytes())
    return (info['MemAvailable'] + info['SwapFree']) // MIB


def test_one_piece_of_data_fills_no_more_memory_than_there_is(place: Place, image_of: Image, importer: Caller) -> None:
    image = image_of(MEMORY)
    assert found(place, image, caller=importer) == []
    repeated(image, left() + 2000)
    row = refused(place, image, importer)
    assert (row.resource, row.errno) == ('memory', 'ENOMEM')


def test_the_content_of_a_memfd_counts_as_often_as_it_is_written(place: Place, image_of: Image, importer: Caller
                                                                 ) -> None:
    image, times = image_of(MEMORY), left() + 2000
    with ImageReader(image) as reader:
        [plain] = [one for one in reader.every(r.SharedMemory) if one.name == 'plain']
        [run] = reader.shared_runs(plain.shm_id)
    extent = r.Extent(run.part, run.offset, MIB)
    claim(image, 'memfd', lambda one: dataclasses.replace(one, shm_id=0, size=times * MIB, content=tuple(
        ContentSegment(at * MIB, extent) for at in range(times))))
    row = refused(place, image, importer)
    assert (row.resource, row.errno) == ('memory', 'ENOMEM')


def test_holes_take_no_memory(place: Place, image_of: Image, importer: Caller) -> None:
    image = image_of("big = os.memfd_create('big'); os.ftruncate(big, 1 << 40); os.pwrite(big, b'x', 1 << 39)")
    assert found(place, image, caller=importer) == []
    end(restored(place, image, importer))


def test_memory_that_is_inherited_counts_once(victim: Callable[..., Victim], place: Place) -> None:
    """What a restart says that it has filled, and what the plan has said."""
    running = victim('forked')
    image = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    request = place.request(0, operation='restore', image=image.name)
    with ImageReader(image) as reader:
        plan, _ = prepare(JobContext(request, cast(Channel, None)), reader)
        every, inherited = most_to_fill(reader, ()), inherited_bytes(reader, plan)
        shared = sum(run.pages for one in reader.every(r.PageRuns) for run in one.runs
                     if one.owner_kind == r.OF_SHARED_MEMORY) * r.PAGE
    with DirectWorker() as worker:
        result = worker.run(request)
    end(result['root'])
    assert 0 < inherited < every
    # the vdso has pages in the image, too, which are the kernel's own
    assert result['bytes'] <= every - inherited - shared <= result['bytes'] + 64 * r.PAGE


@pytest.mark.parametrize('whose', ['tree', 'ckptd'])
def test_the_limit_of_a_cgroup(place: Place, image_of: Image, importer: Caller, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """No memory controller is at hand: a directory that looks like a cgroup. Shared objects are filled by the worker.
    """
    image, group = image_of(MEMORY), tmp_path / 'limited'
    group.mkdir()
    for name, text in (('memory.max', str(64 * MIB)), ('memory.current', str(50 * MIB)), ('memory.stat', (
            f'active_file {4 * MIB}\ninactive_file {6 * MIB}\n'))):
        (group / name).write_text(text)
    own = read_cgroup2(os.getpid()) if whose == 'ckptd' else ''
    limited = SimpleNamespace(path=group, name='limited')
    monkeypatch.setattr(capacity, '_above', lambda home: [limited] if (home == own) == bool(own) else [])
    assert not [row for row in found(place, image, caller=importer, cgroup='/x') if row.resource == 'memory']
    repeated(image, 30)
    rows = [row for row in found(place, image, caller=importer, cgroup='/x') if row.resource == 'memory']
    assert [(row.errno, row.severity) for row in rows] == [('ENOMEM', 'refusal')]
    assert f'limited{" of ckptd" if whose == "ckptd" else ""} has {24 * MIB:,} left' in rows[0].reason


def test_the_content_of_deleted_files_has_to_fit(place: Place, home: Path, image_of: Image, importer: Caller) -> None:
    with mounted(home / 'small', '-t', 'tmpfs', '-o', f'size=8m,uid={ORDINARY_UID},mode=755', 'none'):
        image = image_of("gone = os.open('small/gone', os.O_RDWR | os.O_CREAT)\n"
                         "os.write(gone, bytes([67]) * (1 << 20)); os.unlink('small/gone')")
        assert found(place, image, caller=importer) == []
        claim(image, 'regular', lambda one: dataclasses.replace(one, size=9 * MIB, content=tuple(
            dataclasses.replace(one.content[0], start=at * MIB) for at in range(9))))
        row = refused(place, image, importer)
        assert (row.resource, row.errno) == ('deleted files', 'ENOSPC')
        assert str(home / 'small') in row.reason


def pipe_limit(name: str) -> int:
    return int(Path(f'/proc/sys/fs/pipe-{name}').read_text())


def test_pipes_beyond_what_a_user_may_have(place: Place, image_of: Image, importer: Caller,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    image, largest = image_of('pipes = [os.pipe() for _ in range(20)]'), pipe_limit('max-size')
    assert found(place, image, caller=importer) == []

    def row(**limits: int) -> Finding:
        """What is said where the sysctl fs.pipe-user-pages-* is that."""
        with monkeypatch.context() as patched:
            number = capacity._number
            patched.setattr(capacity, '_number', lambda path: limits.get(path.rpartition('-')[2], number(path)))
            [one] = [one for one in found(place, image, caller=importer) if one.resource == 'pipes']
            assert not [one for one in found(place, image) if one.resource == 'pipes']      # asked by root
        assert (one.errno, one.severity) == ('EPERM', 'refusal')
        return one
    assert '320 pages' in row(soft=319).reason
    assert '320 pages' in row(hard=319).reason
    # those of two pages are always to be had
    claim(image, 'pipe', lambda one: dataclasses.replace(one, capacity=8192))
    with pytest.raises(ValueError, match='not enough values'):
        row(soft=30)
    assert '40 pages' in row(hard=39).reason
    claim(image, 'pipe', lambda one: dataclasses.replace(one, capacity=2 * largest))
    assert 'fs.pipe-max-size' in row().hint


def test_pipes_that_only_root_may_have_are_not_made(place: Place, image_of: Image, importer: Caller) -> None:
    count = pipe_limit('user-pages-soft') * r.PAGE // pipe_limit('max-size') + 1
    image = image_of(f'pipes = [os.pipe() for _ in range({count})]')
    claim(image, 'pipe', lambda one: dataclasses.replace(one, capacity=pipe_limit('max-size')))
    assert refused(place, image, importer).resource == 'pipes'


def test_more_tasks_than_the_asker_may_have(place: Place, image_of: Image) -> None:
    """The limit of the process that asks, whatever the tree's own is, which counts where nobody waits for an answer."""
    with asking(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))) as caller:
        image = image_of(OPEN)
        rows = [row for row in checked(place, image, caller=caller) if row.severity == 'refusal']
        with DirectWorker() as worker, pytest.raises(CkptError) as caught:
            worker.run(place.request(0, operation='restore', image=image.name, caller=caller))
        assert [(one.resource, one.errno) for one in caught.value.refusals] == [
            (row.resource, row.errno) for row in rows] == [('RLIMIT_NPROC', 'EPERM'), ('RLIMIT_NPROC', 'EAGAIN')]
        row = rows[1]
        assert f'uid {ORDINARY_UID} has' in row.reason
        assert not [row for row in found(place, image) if row.resource == 'RLIMIT_NPROC']       # asked by root
        gone = msgspec.structs.replace(caller, start_time=caller.start_time - 1)
        assert found(place, image, caller=gone) == []
        rewrite(image, r.Limits, lambda one: dataclasses.replace(one, limits=tuple(
            r.Limit(1, limit.hard) if number == resource.RLIMIT_NPROC else limit
            for number, limit in enumerate(one.limits))))
        assert about(found(place, image, caller=gone), 'RLIMIT_NPROC').errno == 'EAGAIN'


@contextmanager
def asking(setup: Callable[[], object]) -> Iterator[Caller]:
    """The user, with a process that has done setup() and asks."""
    with subprocess.Popen(['/bin/sleep', '1000'], cwd='/', user=ORDINARY_UID, group=ORDINARY_UID, extra_groups=[],
                          preexec_fn=setup) as process:
        yield Caller(ORDINARY_UID, ORDINARY_UID, (ORDINARY_UID,), process.pid, 0, read_status(os.getpid()).cap_bnd,
                     start_time=read_stat(process.pid).start_time)
        process.kill()
