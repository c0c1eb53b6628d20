# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an ordinary user's image claims of files: owners, paths, signals, leases. A restart gives the user no more than
the user has, whatever the worker may do."""

import dataclasses
import fcntl
import os
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.engine.messages import Caller
from ckptd.engine.restore.bank import Bank
from ckptd.engine.restore.files import Access, Files
from ckptd.errors import CkptError, Refusal
from ckptd.image import records as r
from ckptd.image.grammar import Struct
from ckptd.image.reader import ImageReader
from ckptd.kinds.base import F_GETOWNER_UIDS, read_open_file
from ckptd.kinds.locks import EOF, LEASE, Lock
from ckptd.kinds.registry import BY_TAG
from tests.engine.driver import ORDINARY_UID, DirectWorker, Place, me, place_of
from tests.engine.test_obstacles import checked, found, importer
from tests.engine.test_owners import end
from tests.lib import settled
from tests.lib.altered import alter, rewrite
from tests.lib.brood import Brood, libc
from tests.live.kinds.test_rollback import CLONE_NEWNS, MS_PRIVATE, MS_REC

__all__ = ['importer']      # a fixture: an ordinary user with a process that asks

pytestmark = pytest.mark.needs('root', 'ptrace')

PYTHON = '/usr/bin/python3'     # the interpreter of the checkout may be where nobody else can read it
PRELUDE = """
import fcntl, mmap, os, signal, struct, time
def done():
    os.dup2(os.open('/dev/null', os.O_RDWR), 1)
    while True: time.sleep(1000)
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).make()


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
    def altered(saved: r.OpenFile) -> r.OpenFile:
        if saved.kind != tag:
            return saved
        record = change(BY_TAG[tag].record.decode(saved.data))
        return dataclasses.replace(saved, data=record.encode(), **fields)  # type: ignore[arg-type]
    rewrite(image, r.OpenFile, altered)


def restored(place: Place, image: Path, caller: Caller, **more: object) -> int:
    with DirectWorker() as worker:
        return int(worker.run(place.request(0, target='', operation='restore', image=image.name, caller=caller,
                                            **more))['root'])


def warned(rows: list[Refusal], word: str) -> Refusal:
    [row] = [row for row in rows if word in row.reason]
    assert (row.severity, bool(row.hint)) == ('warning', True)
    return row


def refused(place: Place, image: Path, caller: Caller, **more: object) -> Refusal:
    """The one thing that is in the way, by a dry run and by a restore alike."""
    [row] = [row for row in checked(place, image, caller=caller, **more) if row.severity == 'refusal']
    assert row.hint
    with DirectWorker() as worker, pytest.raises(CkptError) as caught:
        worker.run(place.request(0, target='', operation='restore', image=image.name, caller=caller, **more))
    assert [one for one in caught.value.refusals if one.severity == 'refusal'] == [row]
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
    with ImageReader(image_of(OPEN)) as reader, pytest.raises(PermissionError, match='it leads '):
        Access(reader, importer, 'accept', -1).open(way.replace('PID', str(os.getpid())), os.O_RDONLY)


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
            Access(reader, me(), 'accept', -1).open(f'/proc/{tids[0]}/maps', os.O_RDONLY)
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
        access = Access(reader, importer, 'accept', -1)
        if allowed:
            os.close(access.open(path, flags))
        else:
            with pytest.raises(PermissionError):
                access.open(path, flags)


def test_an_open_sysctl_is_not_handed_out(place: Place, image_of: Image, importer: Caller) -> None:
    """Root's effective uid may open it for writing."""
    image = image_of(OPEN)
    put_path(image, '/proc/sys/kernel/core_pattern', os.O_RDWR)
    with DirectWorker() as worker, pytest.raises(CkptError, match='may not be read and written'):
        worker.run(place.request(0, target='', operation='restore', image=image.name, caller=importer,
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
            access = Access(reader, importer, 'accept', -1)
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
        access = Access(reader, importer, 'accept', -1)
        os.close(access.open(f'/proc/{number}/status', os.O_RDONLY))
        access._pids = {number: number + 1}
        with pytest.raises(PermissionError, match='has another number here'):
            access.open(f'/proc/{number}/status', os.O_RDONLY)


def test_a_rollback_leaves_files_alone_that_are_made_up(place: Place, image_of: Image, importer: Caller) -> None:
    """What the user may write is not written by us: another's task, which the kernel asks for its rights."""
    image = image_of("file = os.open('file', os.O_RDWR | os.O_CREAT); os.write(file, b'x' * 100)", save_files=True)
    put_path(image, f'/proc/{importer.pid}/comm', os.O_RDWR)
    claim(image, 'regular', lambda one: dataclasses.replace(one, size=0, saved=()))
    with DirectWorker() as worker, pytest.raises(CkptError, match='keeps no content'):
        worker.run(place.request(0, target='', operation='restore', image=image.name, caller=importer,
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
    rewrite(image, r.OpenFile, lambda one: dataclasses.replace(
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
    with ImageReader(image) as reader, Bank(100) as bank:
        files = Files(reader, bank, importer, 'refuse', -1)
        files._pids = {1: os.getpid()}
        read, write = os.pipe()
        for name, uid in (('root', 0), ('another', 1234)):
            files._set_owner(read, r.OpenFile(1, name, 0, 0, 0, 1, 1, 0, '', b'', uid, uid))
            assert fcntl.fcntl(read, F_GETOWNER_UIDS, bytes(8)) == struct.pack('II', *[ORDINARY_UID] * 2)
        os.close(read)
        os.close(write)
        files._mail[0].close()


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
