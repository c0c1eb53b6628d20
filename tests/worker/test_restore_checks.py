# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plan first: each thing that stands in the way of a restart is brought about, and told of before there is a process.

What cannot be had on the machine that runs this (another processor) is altered in the image.
"""

import dataclasses
import os
import resource
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from ckptd.errors import Busy, Finding, ImageDamaged, NoSuchTarget, PermissionDenied, Refused
from ckptd.image import records as r
from ckptd.image.grammar import Record
from ckptd.image.manifest import NAME, encode_manifest, read_manifest
from ckptd.image.reader import ImageReader
from ckptd.kernel.cgroup import Cgroup
from ckptd.kernel.creds import CAP_SYS_RESOURCE, capget
from ckptd.kernel.shm import attached
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2
from ckptd.objects.attributes.mapping_policies import MappingPolicies
from ckptd.objects.attributes.memory_policy import MemoryPolicy
from ckptd.objects.files.base import InheritedFiles
from ckptd.operation.context import JobContext
from ckptd.protocol.broker_calls import Placed
from ckptd.protocol.channel import Channel
from ckptd.protocol.requests import Caller
from ckptd.restore.checks import obstacles
from ckptd.restore.checks.capacity import bytes_to_read
from ckptd.restore.creation_order import CreateTask
from ckptd.restore.file_access import FileAccess
from ckptd.restore.prepare import prepare
from ckptd.restore.xstate import own_xstate
from ckptd.worker.broker.identity import identity_of
from ckptd.worker.broker.placement import TreePlace
from tests.lib import settled
from tests.lib.altered import alter, rewrite
from tests.lib.victim import Victim, kill_session
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, as_user, place_of

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

Rows = list[Finding]


@pytest.fixture
def asleep(tmp_path: Path) -> Iterator['Sleeper']:
    with Sleeper(tmp_path / 'work') as sleeper:
        yield sleeper


class Sleeper:
    """A program of its own, that writes to a file of its own in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output, self.program = directory / 'output', directory / 'snooze'

    def __enter__(self) -> 'Sleeper':
        self.directory.mkdir()
        shutil.copy('/bin/sleep', self.program)
        with self.output.open('wb') as output:
            output.write(b'so far')
            output.flush()
            # all three descriptors lead to one file
            self.process = subprocess.Popen([self.program, '1000'], stdin=subprocess.DEVNULL, stdout=output,
                                            stderr=output, cwd=self.directory, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def image(self, place: Place, **more: Any) -> Path:
        """Its image; it is dead."""
        image = place.checkpoint(self.process.pid, after='kill', **more)
        self.process.wait()
        settled.reap_orphans()
        return image


def checked(place: Place, image: Path, **more: Any) -> Rows:
    """What a dry run by a worker says."""
    with DirectWorker() as worker:
        result = worker.run(place.request(0, operation='check-restore', image=image.name, **more))
    return [Finding(**row) for row in result['refusals']]


def found(place: Place, image: Path, **more: Any) -> Rows:
    """The same without a worker: of an image that is no more than read."""
    request = place.request(0, operation='check-restore', image=image.name, **more)
    with ImageReader(image) as reader:
        return prepare(JobContext(request, cast(Channel, None)), reader)[1]


def only(rows: Rows, severity: str = 'refusal') -> Finding:
    assert [row.severity for row in rows] == [severity], rows
    assert rows[0].hint
    return rows[0]


def about(rows: Rows, name: str) -> Finding:
    [row] = [row for row in rows if row.resource == name]
    assert row.hint
    return row


# ---------------------------------------------------------------- as it is

@pytest.mark.parametrize('name', ['files', 'memory', 'shared', 'tree'])
def test_nothing_in_the_way(victim: Callable[..., Victim], place: Place, name: str) -> None:
    running = victim(name)
    image = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    assert checked(place, image) == []
    assert not Path(f'/proc/{running.pid}').exists()


def test_all_at_once(place: Place, asleep: Sleeper) -> None:
    """The same rows by a dry run and by the restore that is refused, which leaves nothing."""
    image = asleep.image(place)
    shutil.rmtree(asleep.directory)
    rows = checked(place, image)
    assert [row.resource.split()[0] for row in rows] == ['fd', 'vma', 'cwd']
    assert {row.errno for row in rows} == {'ENOENT'}
    assert {(row.pid, row.comm) for row in rows} == {(asleep.process.pid, 'snooze')}
    with DirectWorker() as worker, pytest.raises(Refused) as caught:
        worker.run(place.request(0, operation='restore', image=image.name))
    assert list(caught.value.refusals) == rows
    assert caught.value.phase == 'plan'
    assert not Path(f'/proc/{asleep.process.pid}').exists()


def test_a_pid_in_use(place: Place, asleep: Sleeper) -> None:
    image = place.checkpoint(asleep.process.pid)
    row = only(checked(place, image))
    pid = asleep.process.pid
    assert (row.pid, row.comm, row.errno) == (pid, 'snooze', 'EEXIST')
    assert f'snooze[{pid}]' in row.reason
    with DirectWorker() as worker, pytest.raises(Busy) as caught:
        worker.run(place.request(0, operation='restore', image=image.name))
    assert caught.value.exit_status == 75
    assert checked(place, image, new_pidns=True) == []


def test_damages_are_rows(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    for name in ('files.img', 'data-0.img'):
        os.truncate(image / name, 4096)
    rows = checked(place, image)
    assert {row.errno for row in rows} == {'EBADMSG'}
    assert [name for name in ('files.img', 'data-0.img') if any(name in row.reason for row in rows)] == [
        'files.img', 'data-0.img']
    with DirectWorker() as worker, pytest.raises(ImageDamaged):
        worker.run(place.request(0, operation='restore', image=image.name))


# ---------------------------------------------------------------- files

def write_more(path: Path) -> None:
    with path.open('ab') as file:
        file.write(b', more')


def put_another(path: Path) -> None:
    content, at = path.read_bytes(), path.stat()
    other = path.with_name('other')
    other.write_bytes(content)
    other.chmod(at.st_mode)
    os.utime(other, ns=(at.st_atime_ns, at.st_mtime_ns))
    other.replace(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


HOW = [(write_more, 'ESTALE', ['has 12 bytes, not 6', '(mtime)']), (touch, 'ESTALE', ['1970-01-01', '(mtime)']),
       (put_another, 'ESTALE', ['is another file (inode']), (Path.unlink, 'ENOENT', ['is missing']),
       (make_directory, 'ESTALE', ['is no longer a regular file'])]


@pytest.mark.parametrize(('change', 'errno', 'words'), HOW, ids=['more', 'touched', 'another', 'missing', 'directory'])
def test_an_open_file_that_went_on_living(place: Place, asleep: Sleeper, change: Callable[[Path], object], errno: str,
                                          words: list[str]) -> None:
    """Which, and how; once, though two descriptors lead to it."""
    image = asleep.image(place)
    change(asleep.output)
    row = only(found(place, image))
    assert (row.pid, row.resource, row.errno) == (asleep.process.pid, 'fd 1', errno)
    assert all(word in row.reason for word in (str(asleep.output), *words)), row


def test_accepted_changes_are_warnings_and_told_again(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    write_more(asleep.output)
    rows = found(place, image, changed_files='accept')
    assert 'has 12 bytes' in only(rows, 'warning').reason
    with DirectWorker() as worker:
        result = worker.run(place.request(0, operation='restore', image=image.name, changed_files='accept'))
    os.kill(result['root'], signal.SIGKILL)
    assert [row['reason'] for row in result['warnings']] == [row.reason for row in rows]


@pytest.mark.parametrize(('change', 'errno', 'words'), HOW[1:4], ids=['touched', 'another', 'missing'])
def test_a_program_that_is_another_now(place: Place, asleep: Sleeper, change: Callable[[Path], object], errno: str,
                                       words: list[str]) -> None:
    image = asleep.image(place)
    change(asleep.program)
    row = only(found(place, image))
    assert (row.pid, row.errno) == (asleep.process.pid, errno)
    assert row.resource.startswith(('vma ', 'exe'))
    assert all(word in row.reason for word in (str(asleep.program), *words)), row
    # what is there can be taken as it is, what is not cannot
    only(found(place, image, changed_files='accept'), 'refusal' if errno == 'ENOENT' else 'warning')
    only(found(place, image, changed_files='rollback'))


def test_a_program_that_may_not_be_executed(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    asleep.program.chmod(0o644)
    row = only(found(place, image))
    assert (row.errno, 'executed' in row.reason) == ('EACCES', True)


def test_a_directory_that_is_gone(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    alter(image, r.Fs, cwd='/does/not/exist', root='/nor/this')
    rows = found(place, image)
    assert {(row.resource, row.errno) for row in rows} == {('cwd', 'ENOENT'), ('root', 'ENOENT')}


def test_a_root_directory_is_not_for_others(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    alter(image, r.Fs, root='/usr')
    assert found(place, image) == []
    row = about([row for row in found(place, image, caller=nobody()) if row.errno == 'EPERM'], 'root')
    assert '/usr' in row.reason


def test_files_are_looked_at_by_the_rights_of_the_caller(place: Place, asleep: Sleeper) -> None:
    """pytest's directory is for nobody but its owner, so to others nothing is there."""
    image = asleep.image(place)
    rows = found(place, image, caller=nobody())
    assert about(rows, 'fd 1').errno == 'ENOENT'
    assert about(rows, 'cwd').errno == 'EACCES'


def test_an_unknown_kind(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    alter(image, r.SavedFile, kind='crystal ball')
    assert {row.errno for row in found(place, image)} == {'EBADMSG'}
    assert all("'crystal ball'" in row.reason and 'newer' in row.hint for row in found(place, image))


@pytest.mark.parametrize(('record', 'what'), [(r.Vma, 'a mapping'), (r.SharedMemory, 'a shared object')])
def test_an_unknown_kind_of_memory(victim: Callable[..., Victim], place: Place, record: type[Record], what: str
                                   ) -> None:
    running = victim('shared')
    image = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    alter(image, record, kind=77)
    row = about(found(place, image), 'memory')
    assert (row.errno, row.reason) == ('EBADMSG', f'memory.img: {what} of kind 77, which is unknown')
    with DirectWorker() as worker, pytest.raises(ImageDamaged, match='of kind 77'):
        worker.run(place.request(0, operation='restore', image=image.name))


def test_numa_nodes_that_are_not_there_and_keys(victim: Callable[..., Victim], place: Place) -> None:
    """Of another machine: a thread and a mapping lose their policies, and the tree is restored."""
    running = victim('settings')
    image = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    far = bytes(100) + b'\x01'

    def moved(one: r.TaskAttribute) -> r.TaskAttribute:
        if one.name == 'memory policy':
            return dataclasses.replace(one, data=MemoryPolicy(1, far).encode())
        if one.name != 'mapping policies':
            return one
        policies = MappingPolicies.decode(one.data).policies
        return dataclasses.replace(one, data=MappingPolicies(tuple(
            dataclasses.replace(policy, nodes=far) for policy in policies)).encode())

    rewrite(image, r.TaskAttribute, moved)
    every = found(place, image)
    assert 'had a keyring of its thread and its session' in {row.reason for row in every if row.resource == 'keyrings'}
    rows = [row for row in every if row.resource == 'memory policy']
    assert len(rows) == 4       # of threads, and of mappings, in two processes
    assert {(row.errno, row.severity) for row in rows} == {('EINVAL', 'warning')}
    with DirectWorker() as worker:
        root = int(worker.run(place.request(0, operation='restore', image=image.name))['root'])
    assert ' default ' in Path(f'/proc/{root}/numa_maps').read_text()
    kill_session(root)
    settled.reap_orphans()


def test_a_segment_in_use(victim: Callable[..., Victim], place: Place) -> None:
    running = victim('shared')
    image = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    settled.reap_orphans()
    with ImageReader(image) as reader:
        segment = next(one for one in reader.every(r.SharedMemory) if one.kind == r.SYSV and not one.mode & 0o1000)
    with attached(segment.shmid, segment.size):
        row = only(found(place, image))
    assert (row.resource, row.errno) == (f'shmid {segment.shmid}', 'EBUSY')
    assert f'[{os.getpid()}]' in row.reason
    assert found(place, image) == []


# ---------------------------------------------------------------- the machine

def xcr0(bits: int) -> Callable[[r.Registers], r.Registers]:
    def change(record: r.Registers) -> r.Registers:
        area = bytearray(record.xstate)
        struct.pack_into('<Q', area, 464, struct.unpack_from('<Q', area, 464)[0] | bits)
        return dataclasses.replace(record, xstate=bytes(area))
    return change


def test_another_machine(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    alter(image, r.Header, machine='aarch64', page_size=65536)
    rows = found(place, image)
    assert 'aarch64' in about(rows, 'architecture').reason
    assert '65536' in about(rows, 'page size').reason


def test_a_processor_with_less(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    rewrite(image, r.Registers, xcr0(1 << 60))
    row = only(checked(place, image))
    assert (row.pid, row.resource, row.errno) == (asleep.process.pid, 'xstate', 'EOPNOTSUPP')
    assert '60' in row.reason


def test_a_processor_with_another_layout(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    rewrite(image, r.Registers, lambda one: dataclasses.replace(one, xstate=one.xstate + bytes(64)))
    assert only(found(place, image)).resource == 'xstate'


def test_another_kernel(place: Place, asleep: Sleeper) -> None:
    """Its vdso is bridged, but not for who stands inside."""
    image = asleep.image(place)
    rewrite(image, r.Vma, lambda vma: dataclasses.replace(vma, start=vma.start - 4096) if vma.kind == r.VVAR else vma)
    assert only(found(place, image), 'warning').resource == 'vdso'
    with ImageReader(image) as reader:
        [text] = [vma for vma in reader.every(r.Vma) if vma.kind == r.VDSO]
    rewrite(image, r.Registers, lambda one: dataclasses.replace(
        one, gpr=one.gpr[:128] + struct.pack('<Q', text.start + 8) + one.gpr[136:]))
    rows = found(place, image)
    assert [(row.resource, row.severity) for row in rows] == [('vdso', 'warning'), ('vdso', 'refusal')]
    assert rows[1].pid == asleep.process.pid


# ---------------------------------------------------------------- rights

def nobody(**more: Any) -> Caller:
    return Caller(**{'uid': ORDINARY_UID, 'gid': ORDINARY_UID, 'groups': (), 'pid': os.getpid(), 'capabilities': 0,
                     **more})


def test_the_image_of_somebody_else(place: Place, asleep: Sleeper, importer: Caller) -> None:
    image = asleep.image(place)
    rows = found(place, image, caller=nobody())
    assert about(rows, 'image').errno == 'EPERM'
    # and what root may be, others may not
    assert about(rows, 'uid').reason == f'runs as uid 0, the caller is uid {ORDINARY_UID}'
    assert about(rows, 'gid').errno == 'EPERM'
    assert 'CAP_CHOWN' in about(rows, 'capabilities').reason
    with DirectWorker() as worker, pytest.raises(PermissionDenied, match=f'does not belong to uid {importer.uid}'):
        worker.run(place.request(0, operation='restore', image=image.name, caller=importer))


def test_groups_of_the_caller(place: Place, asleep: Sleeper) -> None:
    image, uid = asleep.image(place), ORDINARY_UID
    alter(image, r.Credentials, uids=(uid,) * 4, gids=(5,) * 4, groups=(5, 6), capabilities=(0, 0, 0, 0, 0))
    assert about(found(place, image, caller=nobody(groups=(5,))), 'gid').reason == 'is in group 6, the caller is not'
    assert not [row for row in found(place, image, caller=nobody(groups=(5, 6))) if row.resource == 'gid']


@pytest.mark.parametrize('which', range(5), ids=['inheritable', 'permitted', 'effective', 'bounding', 'ambient'])
def test_a_capability_that_we_lack(place: Place, asleep: Sleeper, which: int) -> None:
    image = asleep.image(place)
    sets = tuple(1 << 63 if index == which else 0 for index in range(5))
    alter(image, r.Credentials, capabilities=sets)
    row = only(found(place, image, caller=Caller(0, 0, (), os.getpid(), -1)))
    assert (row.resource, row.errno, 'capability 63' in row.reason) == ('capabilities', 'EPERM', True)
    assert ('bounding' in row.reason) == (which == 3)


def test_a_capability_that_the_caller_lacks(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    row = only(found(place, image, caller=Caller(0, 0, (), os.getpid(), capget().permitted & ~1)))
    assert row.reason == 'has CAP_CHOWN, the caller has not'


# ---------------------------------------------------------------- surroundings

def test_memory_and_numbers(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    rewrite(image, r.PageRuns, lambda one: dataclasses.replace(
        one, runs=(*one.runs[:-1], dataclasses.replace(one.runs[-1], pages=(1 << 32) - 1))))
    assert (only(found(place, image)).resource, found(place, image)[0].errno) == ('memory', 'ENOMEM')


def test_shared_pages_count_once(victim: Callable[..., Victim], place: Place) -> None:
    running = victim('forked')
    image = place.checkpoint(running.pid)
    with ImageReader(image) as reader:
        runs = [run for one in reader.every(r.PageRuns) for run in one.runs]
        every = sum(run.pages for run in runs) * r.PAGE
        pages = {(run.part, run.offset // r.PAGE + page) for run in runs for page in range(run.pages)}
        assert bytes_to_read(reader) == len(pages) * r.PAGE < every


def test_a_number_that_the_machine_does_not_have(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    request = place.request(0, operation='check-restore', image=image.name)
    with ImageReader(image) as reader:
        plan, _ = prepare(JobContext(request, cast(Channel, None)), reader)
        plan.steps.append(CreateTask(1 << 30, 0))
        access = FileAccess(reader, request.caller, 'refuse', -1, InheritedFiles(()))
        row = only(obstacles(reader, plan, request, access))
    assert (row.resource, row.errno) == (f'pid {1 << 30}', 'EINVAL')
    assert 'pid_max' in row.hint


def test_namespaces_that_are_not_made_again(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    alter(image, r.Namespaces, namespaces=tuple(r.Namespace(name, 1, 0) for name in (
        'net', 'pid', 'pid_for_children', 'time', 'uts')))
    rows = found(place, image)
    assert {(row.resource, row.severity) for row in rows} == {('namespace net', 'refusal'),
                                                              ('namespace uts', 'warning')}


@pytest.mark.parametrize('wanted', [signal.SIGTSTP, signal.SIGUSR1])
def test_a_stop_that_needs_another_parent(place: Place, asleep: Sleeper, wanted: int) -> None:
    """As of a job of a shell, which is not in the tree: without its shell SIGTSTP stops it no more."""
    image = asleep.image(place)
    alter(image, r.TaskRecord, stop_signal=wanted, state=ord('T'))
    row = only(found(place, image), 'warning')
    assert (row.resource, row.pid) == ('job control', asleep.process.pid)
    assert f'stopped by {signal.Signals(wanted).name}, and comes back stopped by SIGSTOP' in row.reason
    with DirectWorker() as worker:
        worker.run(place.request(0, operation='restore', image=image.name))
    # proc(5): exit_code of a stopped process is the signal
    fields = Path(f'/proc/{asleep.process.pid}/stat').read_text().rpartition(')')[2].split()
    os.kill(asleep.process.pid, signal.SIGKILL)
    settled.reap_orphans()
    assert (fields[0], fields[49]) == ('T', str(signal.SIGSTOP))


def test_a_terminal_is_missed(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    alter(image, r.ProcessState, tty=os.makedev(136, 1))
    row = only(found(place, image), 'refusal')
    assert (row.resource, '--terminal=detach' in row.hint) == ('terminal', True)
    assert only(found(place, image, detach_terminal=True), 'warning').resource == 'terminal'


def test_an_attribute_of_a_newer_ckptd(place: Place, asleep: Sleeper) -> None:
    """What is not known would be lost, so it is refused by name."""
    image = asleep.image(place)
    rewrite(image, r.TaskAttribute, lambda one: dataclasses.replace(one, name=one.name.replace('core', 'more')))
    row = only(found(place, image))
    assert (row.resource, row.errno) == ('moredump_filter', 'EOPNOTSUPP')


def test_an_attribute_that_no_one_can_decode(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    rewrite(image, r.TaskAttribute, lambda one: dataclasses.replace(one, data=b'\1')
            if one.name == 'coredump_filter' else one)
    with pytest.raises(ImageDamaged, match='TaskAttribute coredump_filter of 1: record cut short'):
        found(place, image)


def test_the_login_of_an_image_from_outside(place: Place, asleep: Sleeper) -> None:
    """It may be made up, and root would write it into the audit log."""
    if not Path('/proc/self/loginuid').exists():
        pytest.skip('this kernel has no CONFIG_AUDIT')
    image = asleep.image(place)
    rewrite(image, r.TaskAttribute, lambda one: dataclasses.replace(one, data=b'\xe8\3\0\0')
            if one.name == 'loginuid' else one)
    assert not found(place, image)
    (image / NAME).write_bytes(encode_manifest(msgspec.structs.replace(read_manifest(image), imported=True)))
    row = only(found(place, image), 'warning')
    assert (row.resource, 'the login of uid 1000' in row.reason) == ('loginuid', True)


def test_processors_that_are_not_there(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    alter(image, r.Scheduling, affinity=bytes(500) + b'\xff')
    row = only(found(place, image), 'warning')
    assert '4000-4007' in row.reason


@pytest.mark.needs('cgroup2')
def test_a_cgroup_that_was_asked_for(place: Place, asleep: Sleeper) -> None:
    image = asleep.image(place)
    row = only(found(place, image, cgroup='/no/such/cgroup', systemd=True))
    assert (row.resource, row.errno) == ('cgroup /no/such/cgroup', 'ENOENT')
    own = Path('/proc/self/cgroup').read_text().rpartition('0::')[2].splitlines()[0]
    assert found(place, image, cgroup=own) == []
    rows = found(place, image, cgroup=own, caller=nobody())
    assert about(rows, f'cgroup {own}').errno == 'EACCES'


# ---------------------------------------------------------------- as an ordinary user

def ordinary(work: Callable[[Place, Path], None]) -> None:
    """work(place, image) as a user who has no rights; the image is of a process of that user."""
    def run() -> None:
        settled.become_subreaper()
        place = Place(Path.cwd()).make()
        with Sleeper(Path.cwd() / 'work') as sleeper:
            image = sleeper.image(place, forked=True)
        work(place, image)

    with place_of(ORDINARY_UID) as home:
        as_user(ORDINARY_UID, home, run)


@pytest.mark.needs('user-namespaces')
def test_what_an_ordinary_user_gets_back() -> None:
    """All of it, in a user and pid namespace of its own."""
    ordinary(lambda place, image: check_rows(place, image, set()))


def check_rows(place: Place, image: Path, wanted: set[tuple[str, str]], **more: Any) -> None:
    rows = found(place, image, **more)
    assert {(row.resource, row.errno) for row in rows} == wanted, rows
    assert all(row.hint and row.severity == 'refusal' for row in rows)


@pytest.mark.needs('user-namespaces')
@pytest.mark.parametrize(('cls', 'fields', 'resource_', 'errno'), [
    (r.Credentials, {'uids': (ORDINARY_UID, 0, 0, 0)}, 'uid', 'EPERM'),
    (r.Credentials, {'gids': (5, 5, 5, 5)}, 'gid', 'EPERM'),
    (r.Credentials, {'groups': (5, 6)}, 'groups', 'EPERM'),
    (r.Credentials, {'capabilities': (0, 1 << 12, 0, 0, 0)}, 'capabilities', 'EPERM'),
    (r.ProcessState, {'oom_score_adj': 0}, 'oom_score_adj', 'EACCES'),
    (r.Scheduling, {'nice': 0}, 'scheduling', 'EPERM'),
    (r.Scheduling, {'policy': os.SCHED_FIFO, 'priority': 9}, 'scheduling', 'EPERM'),
    (r.Scheduling, {'policy': 6}, 'scheduling', 'EPERM'),
    (r.Scheduling, {'ioprio': 1 << 13}, 'I/O priority', 'EPERM')])
def test_what_an_ordinary_user_may_not_have(cls: type[Any], fields: dict[str, Any], resource_: str, errno: str
                                            ) -> None:
    def work(place: Place, image: Path) -> None:
        alter(image, cls, **fields)
        check_rows(place, image, {(resource_, errno)})

    ordinary(work)


@pytest.mark.needs('user-namespaces')
def test_limits_are_not_raised_again() -> None:
    own_xstate()        # this forks, which the limit forbids later: a broker does the same

    def work(place: Place, image: Path) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500))
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        check_rows(place, image, {('RLIMIT_NOFILE', 'EPERM'), ('RLIMIT_NPROC', 'EPERM'), ('RLIMIT_NPROC', 'EAGAIN')})

    ordinary(work)


@pytest.mark.needs('user-namespaces')
def test_locked_memory_beyond_the_limit() -> None:
    def work(place: Place, image: Path) -> None:
        rewrite(image, r.Vma, lambda vma: dataclasses.replace(vma, locked=1))
        rewrite(image, r.Limits, lambda one: dataclasses.replace(
            one, limits=(*one.limits[:8], r.Limit(0, 0), *one.limits[9:])))
        check_rows(place, image, {('locked memory', 'EPERM')})

    ordinary(work)


def test_a_hard_limit_above_that_of_root(place: Place, asleep: Sleeper) -> None:
    """With CAP_SYS_RESOURCE it is raised, without it is not."""
    image = asleep.image(place)
    rewrite(image, r.Limits, lambda one: dataclasses.replace(
        one, limits=(*one.limits[:8], r.Limit(0, (1 << 64) - 1), *one.limits[9:])))
    rows = found(place, image)
    if capget().effective >> CAP_SYS_RESOURCE & 1 or resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] < 0:
        assert rows == []
    else:
        assert only(rows).resource == 'RLIMIT_MEMLOCK'
        assert 'unlimited' in rows[0].reason


def test_a_tree_that_had_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended between the look at the target and the freeze."""
    pid = os.posix_spawn('/bin/true', ['true'], {}, setsid=True)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr('ckptd.inspect.scan._require_life', lambda pid: None)
        image = place.checkpoint(pid, forked=True)
    finally:
        os.waitpid(pid, 0)
    row = only(found(place, image))
    assert (row.pid, row.errno) == (0, 'ESRCH')
    assert 'so nothing can run' in row.reason


# ---------------------------------------------------------------- images from outside, and callers in a sandbox

@pytest.fixture
def importer() -> Iterator[Caller]:
    """An ordinary user, with a process that has asked."""
    uid = ORDINARY_UID
    with subprocess.Popen(['sleep', '1000'], user=uid, group=uid, extra_groups=[], cwd='/') as process:
        yield Caller(uid, uid, (uid,), process.pid, 0, capget_bounding(), start_time=read_stat(process.pid).start_time)
        process.kill()


def capget_bounding() -> int:
    return read_status(os.getpid()).cap_bnd


def of_user(image: Path, *, imported: bool) -> None:
    """An image that says that all in it was the ordinary user's."""
    uid = ORDINARY_UID
    alter(image, r.Credentials, uids=(uid,) * 4, gids=(uid,) * 4, groups=(uid,), securebits=0,
          capabilities=(0, 0, 0, capget_bounding(), 0))
    manifest = read_manifest(image)
    (image / NAME).write_bytes(encode_manifest(msgspec.structs.replace(
        manifest, owner_uid=uid, owner_gid=uid, imported=imported)))


def test_an_imported_image_of_nobody_who_is_there(place: Place, asleep: Sleeper, importer: Caller) -> None:
    image = asleep.image(place)
    of_user(image, imported=True)
    gone = msgspec.structs.replace(importer, pid=0)
    assert about(found(place, image, caller=gone), 'credentials').errno == 'ESRCH'


@pytest.mark.parametrize('way', ['ended', 'reused', 'set-user-ID'])
def test_limits_of_whoever_has_the_number_now_are_not_the_callers(place: Place, importer: Caller, way: str) -> None:
    assert identity_of(place.request(0, operation='restore', caller=importer), None)
    other = importer
    if way == 'ended':
        os.kill(importer.pid, signal.SIGKILL)
        os.waitid(os.P_PID, importer.pid, os.WEXITED | os.WNOWAIT)
    else:
        # root's process, as one that has got the number, or that the caller's own has become by execve(2)
        same = read_stat(os.getpid()).start_time
        other = msgspec.structs.replace(importer, pid=os.getpid(), start_time=same - (way == 'reused'))
    with pytest.raises(NoSuchTarget, match='the calling process is gone'):
        identity_of(place.request(0, operation='restore', caller=other), None)


def test_an_imported_image_is_its_importers_alone(place: Place, asleep: Sleeper, importer: Caller) -> None:
    image = asleep.image(place)
    of_user(image, imported=True)
    root = Caller(0, 0, (), os.getpid(), -1)
    assert about(found(place, image, caller=root), 'image').errno == 'EPERM'
    assert not [row for row in found(place, image, caller=importer) if row.resource == 'image']


@pytest.mark.parametrize('way', ['seccomp', 'no_new_privs', 'bounding'])
def test_who_has_given_up_rights_gets_none_back(place: Place, asleep: Sleeper, importer: Caller, way: str) -> None:
    image = asleep.image(place)
    of_user(image, imported=False)
    confined = msgspec.structs.replace(importer, **{way: 0 if way == 'bounding' else True})
    resource_ = 'capabilities' if way == 'bounding' else way
    assert not [row for row in found(place, image, caller=importer) if row.resource == resource_]
    assert about(found(place, image, caller=confined), resource_).errno == 'EPERM'


@pytest.mark.needs('cgroup2')
def test_where_a_users_tree_lives(place: Place, importer: Caller) -> None:
    """In a cgroup of its user's, whatever the image says."""
    own, foreign = read_cgroup2(importer.pid), '/ckptd-test-foreign'
    group = Cgroup.named(foreign)
    group.path.mkdir()
    request = place.request(0, operation='restore', caller=importer)
    tree = TreePlace(SimpleNamespace(request=request), identity_of(request, None), 1)  # type: ignore[arg-type]
    try:
        said = {7: foreign, 8: own, 9: '/../x', 10: '', 11: '/not-there'}
        homes = tree._homes([Placed(pid, cgroup) for pid, cgroup in said.items()])
        assert set(homes.values()) == {own}
        os.chown(group.path / 'cgroup.procs', importer.uid, -1)     # delegated
        assert tree._homes([Placed(7, foreign)]) == {7: foreign}
    finally:
        group.remove()
