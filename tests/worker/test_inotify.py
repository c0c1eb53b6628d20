# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify instances: unread events, what a restart itself does to watched files, and watches that cannot be kept."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import CkptError, Finding, PermissionDenied, Refused
from ckptd.image.manifest import read_manifest
from ckptd.image.reader import ImageReader
from ckptd.image.records import SavedFile
from ckptd.kernel.inotify import IN_ALL_EVENTS, IN_ATTRIB, IN_CREATE, IN_MODIFY
from ckptd.objects.files.inotify import InotifyInstance
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.lib.gate import own_cgroup
from tests.lib.victim import Victim
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, as_user, place_of
from tests.worker.faulty import asking
from tests.worker.test_restore import Generation, generation
from tests.worker.test_restore_checks import checked

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

PRELUDE = '''
import ctypes, fcntl, os, struct, sys, termios
from victim import ready, wait_for_go
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.inotify_init1(os.O_NONBLOCK)

def watch(path, mask, fd=fd):
    wd = libc.inotify_add_watch(fd, os.fsencode(path), mask)
    assert wd > 0, os.strerror(ctypes.get_errno())
    return wd

def unread(fd=fd):
    return struct.unpack('i', fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]

def events(fd=fd):
    data, found = os.read(fd, 65536) if unread(fd) else b'', []
    while data:
        wd, mask, _, size = struct.unpack_from('iIII', data)
        found.append((wd, mask, data[16:16 + size].rstrip(b'\\0').decode()))
        data = data[16 + size:]
    return found

def touch(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT))

'''
Program = Callable[[str], Generation]


@pytest.fixture
def program(generation: Callable[..., Generation], tmp_path: Path) -> Program:
    """Start a program that has `fd`, watch(), events() and so on. It works in tmp_path/victim or the like."""
    def start(source: str) -> Generation:
        script = tmp_path / 'watcher.py'
        script.write_text(PRELUDE + source)
        return generation('inotify', program=script)
    return start


def refused(tree: Generation, **more: Any) -> list[Finding]:
    with pytest.raises(Refused) as caught:
        tree.place.checkpoint(tree.victim.pid, **more)
    return [row for row in caught.value.refusals if row.severity == 'refusal']


ONE_EVENT = f'''
os.mkdir('watched')
watch('watched', {IN_CREATE})
other = libc.inotify_init1(0)
touch('watched/seen')
size = unread()
ready()
wait_for_go()
'''


def test_an_unread_event_stays_with_the_program(program: Program) -> None:
    """A checkpoint without --kill reads nothing, and says what its image lacks, by fd."""
    tree = program(ONE_EVENT + f'''
assert unread() == size
assert events() == [(1, {IN_CREATE}, 'seen')]
touch('watched/new')
assert events() == [(1, {IN_CREATE}, 'new')]
''')
    image = tree.place.checkpoint(tree.victim.pid)
    [row] = [row for row in read_manifest(image).warnings if row.errno == 'ENOMSG']
    assert (row.resource, row.severity) == ('fd 3', 'warning')
    assert row.reason.startswith('32 bytes of events wait in an inotify instance')
    tree.victim.finish()


def test_unread_events_are_lost_by_a_restart(program: Program) -> None:
    """And no other event takes their place."""
    tree = program(ONE_EVENT + f'''
assert unread() == 0
touch('watched/new')
assert events() == [(1, {IN_CREATE}, 'new')]
''')
    image = tree.kill()
    assert [row.resource for row in read_manifest(image).warnings if row.errno == 'ENOMSG'] == ['fd 3']
    [row] = [row for row in checked(tree.place, image) if row.errno == 'ENOMSG']
    assert (row.resource, row.severity) == ('fd 3', 'warning')
    tree.restore(image)
    tree.finish()


def test_each_instance_has_its_own_warning(program: Program) -> None:
    """They have one inode, and the same number of bytes."""
    tree = program(f'''
other = libc.inotify_init1(0)
watch('.', {IN_CREATE})
watch('.', {IN_CREATE}, other)
touch('file')
ready()
wait_for_go()
assert events() == events(other) != []
''')
    image = tree.place.checkpoint(tree.victim.pid)
    assert sorted(row.resource for row in read_manifest(image).warnings if row.errno == 'ENOMSG') == ['fd 3', 'fd 4']
    tree.victim.finish()


def test_the_restart_causes_no_event(program: Program) -> None:
    """It opens files, puts content back, makes deleted ones again and closes all of them."""
    tree = program(f'''
import mmap
os.mkdir('watched')
os.chdir('watched')
for number in range(3):
    touch(f'file-{{number}}')
log = os.open('log', os.O_RDWR | os.O_CREAT)
os.write(log, b'as it was')
reader = os.open('file-0', os.O_RDONLY)
gone = os.open('gone', os.O_RDWR | os.O_CREAT)
os.write(gone, bytes(5000))
os.unlink('gone')
one = os.open('one', os.O_RDWR | os.O_CREAT)
os.link('one', 'two')
os.unlink('one')
os.mkfifo('fifo')
fifo = os.open('fifo', os.O_RDWR)
os.write(fifo, b'x')
directory = os.open('.', os.O_RDONLY)
memory = mmap.mmap(log, 9, prot=mmap.PROT_READ)
numbers = [watch(name, {IN_ALL_EVENTS}) for name in ('.', 'log', 'file-0', 'two', 'fifo', '..')]
once = watch('file-1', {IN_ALL_EVENTS} | 0x80000000)
ready()
wait_for_go()
found = [event for event in events() if event[2] not in ('go', 'output', 'answer')]
assert found == [], found
assert os.pread(log, 100, 0) == b'as it was'
access = 1
assert sorted(events()) == [(numbers[0], access, 'log'), (numbers[1], access, '')]
''')
    image = tree.kill(save_files=True, save_limit=1 << 20)
    (tree.victim.directory / 'watched/log').write_text('changed since')
    tree.restore(image, changed_files='rollback')
    tree.finish()


def on_file_systems(paths: list[str], touched: list[str], opened: list[str] | None = None) -> str:
    """Watch paths, and change the mode of some of them afterwards."""
    return f'''
keep = [os.open(path, os.O_RDONLY) for path in {opened or []}]
numbers = {{path: watch(path, {IN_ATTRIB}) for path in {paths}}}
ready()
wait_for_go()
assert events() == []
for path in {touched}:
    os.chmod(path, os.stat(path).st_mode)
found = events()
assert found == [(numbers[path], {IN_ATTRIB}, '') for path in {touched}], found
'''


@pytest.fixture
def tmpfs_file() -> Iterator[Path]:
    path = Path(f'/dev/shm/ckptd-test-{os.getpid()}')
    path.touch()
    yield path
    path.unlink()


def test_other_file_systems(program: Program, tmpfs_file: Path, tmp_path: Path) -> None:
    """A file of tmpfs and one of cgroup2 are found by handle; a mount point of proc by its name."""
    cgroup = own_cgroup()
    assert cgroup is not None
    (tmp_path / 'file').touch()
    files = [str(tmpfs_file), f'{cgroup}/cgroup.max.depth', f'{tmp_path}/file']
    tree = program(on_file_systems([*files, '/proc'], files))
    image = tree.kill()
    assert watched_paths(image) == [*files, '/proc']
    tree.restore(image)
    tree.finish()


SYSFS = '/sys/kernel/mm/transparent_hugepage/enabled'


def test_a_file_that_no_handle_finds(program: Program) -> None:
    """sysfs knows no handles: it is refused by number and inode, unless the tree has it open."""
    inode = Path(SYSFS).stat().st_ino
    [row] = refused(program(on_file_systems(['/proc', SYSFS], [])))
    assert (row.errno, row.resource) == ('EOPNOTSUPP', 'fd 3')
    assert f'watch 2 of an inotify instance is on inode {inode} of device ' in row.reason
    assert 'leave it open' in row.hint


def test_a_file_that_is_open_as_well(program: Program) -> None:
    """It is found among those of the tree, and so is a directory above it."""
    tree = program(on_file_systems(['/sys/kernel', SYSFS], [SYSFS], [SYSFS]))
    image = tree.kill()
    assert watched_paths(image) == ['/sys/kernel', SYSFS]
    tree.restore(image)
    tree.finish()


def watched_paths(image: Path) -> list[str]:
    with ImageReader(image) as reader:
        [saved] = [one for one in reader.every(SavedFile) if one.kind == 'inotify']
    return [watch.path for watch in InotifyInstance.decode(saved.data).watches]


def test_a_deleted_file_that_is_closed(program: Program) -> None:
    """An inode lives as long as it is mapped, and then no file descriptor leads to it."""
    tree = program(f'''
file = os.open('gone', os.O_RDWR | os.O_CREAT)
os.write(file, bytes(4096))
libc.mmap.restype = ctypes.c_void_p
libc.mmap(None, ctypes.c_size_t(4096), 1, 2, file, ctypes.c_long(0))
watch('gone', {IN_MODIFY})
os.close(file)
os.unlink('gone')
ready()
wait_for_go()
''')
    assert 'gone (deleted)' in Path(f'/proc/{tree.victim.pid}/maps').read_text()
    [row] = refused(tree)
    assert 'watch 1 of an inotify instance' in row.reason


# ---------------------------------------------------------------- files that are others at the restart

TWO = f'''
os.mkdir('directory')
touch('file')
touch('other')
numbers = [watch(name, {IN_ATTRIB} | {IN_CREATE}) for name in ('file', 'directory', 'other')]
ready()
wait_for_go()
assert events() == []
os.chmod('file', 0o644)
touch('directory/new')
assert events() == [(1, {IN_ATTRIB}, ''), (2, {IN_CREATE}, 'new')]
'''


def put_another(path: Path) -> None:
    """A new file of the same name; the old one exists for a while, so that the new one has another inode."""
    old = path.with_name('old')
    path.rename(old)
    path.touch()
    old.unlink()


def test_a_file_that_is_another_one(program: Program) -> None:
    """It is refused, or watched where the caller accepts changed files."""
    tree = program(TWO)
    image = tree.kill()
    put_another(tree.victim.directory / 'file')
    [row] = checked(tree.place, image)
    assert (row.errno, row.severity) == ('ESTALE', 'refusal')
    assert 'file, which is watched, is another file (inode ' in row.reason
    [row] = checked(tree.place, image, changed_files='accept')
    assert row.severity == 'warning'
    tree.restore(image, changed_files='accept')
    tree.finish()


def test_a_directory_that_is_another_one(program: Program) -> None:
    tree = program(TWO)
    image = tree.kill()
    directory = tree.victim.directory / 'directory'
    directory.rename(directory.with_name('old'))
    directory.mkdir()
    [row] = checked(tree.place, image)
    assert (row.errno, row.severity) == ('ESTALE', 'warning')
    assert 'directory, which is watched, is another one (inode ' in row.reason
    tree.restore(image)
    tree.finish()


def test_files_that_are_in_the_way(program: Program) -> None:
    tree = program(TWO)
    image = tree.kill()
    here = tree.victim.directory
    (here / 'other').unlink()
    [row] = checked(tree.place, image)
    assert (row.errno, row.severity) == ('ENOENT', 'refusal')
    assert 'other, which is watched, is missing' in row.reason
    (here / 'other').hardlink_to(here / 'file')
    rows = checked(tree.place, image, changed_files='accept')
    [row] = [row for row in rows if row.severity == 'refusal']
    assert row.errno == 'ESTALE'
    assert 'is the same file as' in row.reason
    (here / 'other').unlink()
    (here / 'other').mkdir()
    [row] = checked(tree.place, image, changed_files='accept')
    assert 'is no longer a regular file' in row.reason
    assert row.severity == 'refusal'


def test_a_file_that_is_deleted_while_the_tree_is_made(program: Program, tmp_path: Path) -> None:
    """The program hears of the end of its watch, as it would have while it ran."""
    tree = program(f'''
touch('file')
touch('other')
delete_self, ignored = 0x400, 0x8000
watch('file', {IN_ALL_EVENTS})
watch('other', {IN_ATTRIB})
ready()
wait_for_go()
assert events() == [(1, delete_self, ''), (1, ignored, '')]
os.chmod('other', 0o600)
assert events() == [(2, {IN_ATTRIB}, '')]
touch('file')
assert watch('file', {IN_ATTRIB}) == 3
''')
    image = tree.kill()
    with (asking(tmp_path / 'asked', 'ready', 1, (tree.victim.directory / 'file').unlink) as environment,
          DirectWorker(env=environment) as worker):
        worker.run(tree.place.request(0, operation='restore', image=image.name))
    tree.finish()


def test_images_that_lie(program: Program) -> None:
    tree = program(TWO)
    image = tree.kill()

    def lie(**fields: Any) -> None:
        def change(saved: SavedFile) -> SavedFile:
            if saved.kind != 'inotify':
                return saved
            one = InotifyInstance.decode(saved.data)
            return replace(saved, data=replace(one, watches=tuple(
                replace(watch, **fields) for watch in one.watches[:1])).encode())
        rewrite(image, SavedFile, change)

    def verified() -> list[str]:
        with DirectWorker() as worker:
            return list(worker.run(tree.place.request(0, operation='verify', image=image.name))['damages'])
    assert verified() == []
    lie(wd=1 << 31)
    assert any('wd is 2147483648, above 2147483647' in damage for damage in verified())
    lie(wd=0)
    with DirectWorker() as worker, pytest.raises(CkptError, match='cannot be watched again'):
        worker.run(tree.place.request(0, operation='restore', image=image.name))
    settled.reap_orphans()
    lie(wd=1, path='/proc/self/mem', inode=0)
    with DirectWorker() as worker, pytest.raises(CkptError):
        worker.run(tree.place.request(0, operation='restore', image=image.name))
    settled.reap_orphans()
    lie(path='', file_id=999)
    assert any('it refers to open file 999, which is not in the image' in damage for damage in verified())


def test_of_a_user_without_a_broker(tmp_path: Path) -> None:
    """Handles are for root. Files in directories of the tree are found by their names, and others are refused."""
    def work() -> None:
        place = Place(Path.cwd()).make()
        script = Path.cwd() / 'watcher.py'
        script.write_text(PRELUDE + f'''
os.makedirs('a/b')
touch('file')
watch('.', {IN_CREATE})
watch('file', {IN_ATTRIB})
watch('a', {IN_CREATE})
if sys.argv[1:]:
    watch('a/b', {IN_CREATE})
ready()
wait_for_go()
os.chmod('file', 0o600)
assert events() == [(2, {IN_ATTRIB}, '')]
''')
        with Victim('inotify', directory=place.path / 'one', program=script) as running:
            place.checkpoint(running.pid, freeze='ptrace', forked=True)
            running.finish()
        with Victim('inotify', 'deep', directory=place.path / 'two', program=script) as running:
            with pytest.raises(PermissionDenied, match='watch 4 of an inotify instance is on inode'):
                place.checkpoint(running.pid, freeze='ptrace', forked=True)
            running.finish()

    with place_of(ORDINARY_UID) as home:
        as_user(ORDINARY_UID, home, work)
