# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root restores what is an ordinary user's: files come back as that user may have them, and no others."""

import errno
import os
import pwd
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from ckptd.errors import CkptError, Finding, PermissionDenied, Refused
from ckptd.image import records as r
from ckptd.image.reader import ImageReader
from ckptd.kernel.creds import capget
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2
from ckptd.objects.files.base import InheritedFiles
from ckptd.protocol.requests import Caller, ChangedFiles
from ckptd.restore.file_access import FileAccess
from ckptd.restore.file_rights import FileRights, rights_for, rights_of
from tests.lib import settled
from tests.lib.altered import alter
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, me, place_of
from tests.worker.test_restore_checks import about, checked

pytestmark = pytest.mark.needs('root', 'ptrace')

BOB = Caller(ORDINARY_UID, ORDINARY_UID, (), 0, 0)
GROUP = 54321           # nobody's
ACCOUNT_GROUPS = tuple(os.getgrouplist(pwd.getpwuid(ORDINARY_UID).pw_name, ORDINARY_UID))
SECRET = b'of root alone, and longer than what bob wrote'


@dataclass
class Bob:
    """His process, which has the file `output` open and works in its directory."""
    home: Path
    process: subprocess.Popen[bytes]

    @property
    def directory(self) -> Path:
        return self.home / 'work'

    @property
    def output(self) -> Path:
        return self.directory / 'output'

    def image(self, place: Place, caller: Caller = BOB) -> Path:
        """Its image; it is dead."""
        image = place.checkpoint(self.process.pid, after='kill', caller=caller, save_files=True)
        self.process.wait()
        settled.reap_orphans()
        return image


@pytest.fixture
def bob() -> Iterator[Bob]:
    with place_of(ORDINARY_UID) as home:
        (home / 'work').mkdir()
        output = home / 'work' / 'output'
        output.write_bytes(b'so far')
        for path in (output.parent, output):
            os.chown(path, ORDINARY_UID, ORDINARY_UID)
        with output.open('r+b', buffering=0) as file:
            file.seek(3)
            process = subprocess.Popen(['/bin/sleep', '1000'], stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.DEVNULL, cwd=output.parent, start_new_session=True,
                                       user=ORDINARY_UID, group=ORDINARY_UID, extra_groups=[GROUP])
        yield Bob(home, process)
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def asking() -> Iterator[Caller]:
    """Bob, by a process that has asked and stays."""
    with subprocess.Popen(['/bin/sleep', '1000'], cwd='/', user=ORDINARY_UID, group=ORDINARY_UID,
                          extra_groups=[]) as process:
        yield msgspec.structs.replace(BOB, pid=process.pid)
        process.kill()


def restored(place: Place, image: Path, **more: object) -> int:
    """Root restores it; the pid."""
    with DirectWorker() as worker:
        return int(worker.run(place.request(0, operation='restore', image=image.name, **more))['root'])


def refused(place: Place, image: Path, **more: object) -> list[Finding]:
    """Root does not get it restored, and nothing is there; what a dry run says, which is the same."""
    with DirectWorker() as worker, pytest.raises((Refused, PermissionDenied)) as caught:
        worker.run(place.request(0, operation='restore', image=image.name, **more))
    assert [path.name for path in place.spool.iterdir()] == [image.name]
    assert not place.freezes
    rows = [row for row in checked(place, image, **more) if row.severity == 'refusal']
    assert list(caught.value.refusals) == rows
    return rows


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    settled.reap_orphans()


@contextmanager
def led_among_roots(bob: Bob, mode: int) -> Iterator[Path]:
    """A directory of root's with this mode, which is where bob's directory leads by now."""
    with place_of(0) as secrets:
        secrets.chmod(mode)
        bob.directory.rename(bob.home / 'old')
        bob.directory.symlink_to(secrets)
        yield secrets


def secret_in(directory: Path) -> Path:
    """A file of root's alone that is called as bob's."""
    secret = directory / 'output'
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    return secret


@pytest.mark.parametrize('changed', ['refuse', 'accept', 'rollback'])
def test_bobs_files_come_back(place: Place, bob: Bob, changed: ChangedFiles) -> None:
    image = bob.image(place)
    if changed != 'refuse':
        bob.output.write_bytes(b'another thing')
    pid = restored(place, image, changed_files=changed)
    try:
        assert read_status(pid).uids == (ORDINARY_UID,) * 4
        # as the machine's accounts have them: what the image says is bob's word
        assert read_status(pid).groups == ACCOUNT_GROUPS
        assert Path(f'/proc/{pid}/fd/1').readlink() == bob.output
        assert Path(f'/proc/{pid}/cwd').readlink() == bob.directory
        assert 'pos:\t3\n' in Path(f'/proc/{pid}/fdinfo/1').read_text()
        assert bob.output.read_bytes() == (b'another thing' if changed == 'accept' else b'so far')
    finally:
        end(pid)


def test_a_missing_file_is_made_again_as_bobs(place: Place, bob: Bob) -> None:
    image = bob.image(place)
    bob.output.unlink()
    end(restored(place, image, changed_files='rollback'))
    assert bob.output.read_bytes() == b'so far'
    assert bob.output.stat().st_uid == ORDINARY_UID


def test_what_only_a_group_may_open(place: Place, bob: Bob) -> None:
    """One that bob is in; not one that his image says its tree was in."""
    image = bob.image(place)
    os.chown(bob.output, 0, ACCOUNT_GROUPS[0])
    bob.output.chmod(0o660)
    pid = restored(place, image, changed_files='accept')
    end(pid)
    assert about(checked(place, image, changed_files='accept'), 'groups').severity == 'warning'
    os.chown(bob.output, 0, GROUP)
    assert about(refused(place, image, changed_files='accept'), 'fd 1').errno == 'EACCES'


@pytest.mark.parametrize('changed', ['accept', 'rollback'])
@pytest.mark.parametrize('mode', [0o700, 0o755])
def test_a_directory_that_leads_to_roots_files_now(place: Place, bob: Bob, changed: ChangedFiles, mode: int) -> None:
    image, pid = bob.image(place), bob.process.pid
    with led_among_roots(bob, mode) as secrets:
        secret = secret_in(secrets)
        before = secret.stat()
        row = about(refused(place, image, changed_files=changed), 'fd 1')
        assert row.errno == ('ENOENT' if mode == 0o700 else 'EACCES')
        assert f'uid {ORDINARY_UID}' in row.hint
        assert not Path(f'/proc/{pid}').exists()
        # that it is looked at first is no reason to open it by other rights: it may be swapped in between
        with ImageReader(image) as reader, pytest.raises(PermissionError):
            FileAccess(reader, me(), changed, -1, InheritedFiles(())).open(str(bob.output), os.O_RDWR)
        after = secret.stat()
        assert secret.read_bytes() == SECRET
        assert (after.st_mtime_ns, after.st_ctime_ns, after.st_ino) == (
            before.st_mtime_ns, before.st_ctime_ns, before.st_ino)
        assert [path.name for path in secrets.iterdir()] == ['output']


def test_a_missing_file_is_not_made_among_roots(place: Place, bob: Bob) -> None:
    image = bob.image(place)
    with led_among_roots(bob, 0o755) as secrets:
        assert about(refused(place, image, changed_files='rollback'), 'fd 1').errno == 'ENOENT'
        assert list(secrets.iterdir()) == []


def test_a_working_directory_that_bob_may_not_enter(place: Place, bob: Bob) -> None:
    image = bob.image(place)
    with place_of(0) as secrets:
        inner = secrets / 'inner'
        inner.mkdir()
        secrets.chmod(0o700)
        bob.output.rename(inner / 'output')
        bob.directory.rmdir()
        bob.directory.symlink_to(inner)
        rows = refused(place, image, changed_files='accept')
        assert about(rows, 'cwd').errno == 'EACCES'
        assert f'uid {ORDINARY_UID}' in about(rows, 'cwd').hint


def test_a_log_that_root_had_opened_for_bob(place: Place, bob: Bob) -> None:
    """Of bob's image it is out of reach, as for bob himself; of root's own it is not."""
    os.chown(bob.output, 0, 0)
    bob.output.chmod(0o600)
    image = bob.image(place)
    row = about(refused(place, image), 'fd 1')
    assert (row.errno, f'uid {ORDINARY_UID}' in row.hint) == ('EACCES', True)
    with asking() as caller:
        assert about(checked(place, image, caller=caller), 'fd 1').reason == row.reason


def test_an_image_of_root_has_roots_rights(place: Place, bob: Bob) -> None:
    os.chown(bob.output, 0, 0)
    bob.output.chmod(0o600)
    pid = restored(place, bob.image(place, me()))
    try:
        assert read_status(pid).uids == (ORDINARY_UID,) * 4
        assert Path(f'/proc/{pid}/fd/1').readlink() == bob.output
    finally:
        end(pid)


def test_a_root_directory_of_bobs_choice(place: Place, bob: Bob) -> None:
    image = bob.image(place)
    alter(image, r.Fs, root=str(bob.directory))
    assert about(refused(place, image), 'root').errno == 'EPERM'


@pytest.fixture
def hidden() -> Iterator[int]:
    """A process in a directory that everybody may enter, below one that only root may."""
    with place_of(0) as home:
        inner = home / 'inner'
        inner.mkdir()
        (inner / 'output').write_bytes(SECRET)
        home.chmod(0o700)
        with subprocess.Popen(['/bin/sleep', '1000'], cwd=inner) as process:
            yield process.pid
            process.kill()


def test_no_way_through_somebody_elses_process(hidden: int) -> None:
    """What a path finds in /proc is decided by the rights of the user alone, too."""
    before, groups = capget(), os.getgroups()
    path = f'/proc/{hidden}/cwd/output'
    for way in (path, f'/proc/{hidden}/maps'):
        with pytest.raises(PermissionError), rights_of(BOB).taken():
            os.open(way, os.O_RDONLY)
    with rights_of(BOB).taken():
        assert capget() == before._replace(effective=0)
    assert (capget(), os.getgroups()) == (before, groups)
    assert Path(path).read_bytes() == SECRET


@pytest.mark.parametrize('by', ['root', 'bob'])
def test_what_a_process_has_open_of_itself(place: Place, by: str) -> None:
    """It is opened while the process is root's yet."""
    program = 'exec 3</proc/self/maps >/dev/null; exec sleep 1000'
    with subprocess.Popen(['/bin/sh', '-c', program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, cwd='/', start_new_session=True, user=ORDINARY_UID,
                          group=ORDINARY_UID, extra_groups=[]) as process:
        assert process.stdout is not None
        process.stdout.read()       # its end: fd 3 is there
        image = Bob(Path('/'), process).image(place)
    with asking() as caller:
        pid = restored(place, image, caller=me() if by == 'root' else caller)
    try:
        assert Path(f'/proc/{pid}/fd/3').readlink() == Path(f'/proc/{pid}/maps')
    finally:
        end(pid)


@pytest.mark.needs('cgroup2')
def test_the_cgroup_is_the_callers_choice(place: Place, bob: Bob) -> None:
    """Bob may not put processes there, and root, who names it, may."""
    image, own = bob.image(place), read_cgroup2(os.getpid())
    assert not [row for row in checked(place, image, cgroup=own) if row.resource == f'cgroup {own}']


def test_whose_rights(place: Place, bob: Bob) -> None:
    image = bob.image(place)
    with ImageReader(image) as reader:
        assert rights_for(reader, me()) == FileRights(ORDINARY_UID, ORDINARY_UID, (GROUP,))
        assert rights_for(reader, BOB) == FileRights(ORDINARY_UID, ORDINARY_UID, ())
    # of a tree that was not all the owner's: its groups are not his
    alter(image, r.Credentials, uids=(0,) * 4, gids=(0,) * 4, groups=(0,))
    with ImageReader(image) as reader:
        assert rights_for(reader, me()) == FileRights(ORDINARY_UID, ORDINARY_UID, ())


# ---------------------------------------------------------------- root's own image of a process of bob's

@pytest.mark.parametrize('changed', ['accept', 'rollback'])
@pytest.mark.parametrize('mode', [0o700, 0o755])
def test_roots_image_leads_to_no_other_file_of_roots(place: Place, bob: Bob, changed: ChangedFiles, mode: int) -> None:
    image = bob.image(place, me())
    with led_among_roots(bob, mode) as secrets:
        secret = secret_in(secrets)
        assert about(refused(place, image, changed_files=changed), 'fd 1').errno in ('EACCES', 'ESTALE')
        with ImageReader(image) as reader, pytest.raises(OSError) as caught:
            FileAccess(reader, me(), changed, -1, InheritedFiles(())).open(str(bob.output), os.O_RDWR)
        assert caught.value.errno == errno.ELOOP
        assert secret.read_bytes() == SECRET
        assert [path.name for path in secrets.iterdir()] == ['output']


def test_of_roots_image_nothing_is_made_among_roots_files(place: Place, bob: Bob) -> None:
    image = bob.image(place, me())
    with led_among_roots(bob, 0o755) as secrets:
        assert about(refused(place, image, changed_files='rollback'), 'fd 1').errno == 'ENOENT'
        assert list(secrets.iterdir()) == []


@pytest.mark.parametrize('mode', [0o600, 0o644])
@pytest.mark.parametrize('changed', ['refuse', 'accept', 'rollback'])
def test_a_log_of_roots_comes_back_from_roots_image(place: Place, bob: Bob, changed: ChangedFiles, mode: int) -> None:
    """As it does for a service whose output systemd has opened."""
    os.chown(bob.output, 0, 0)
    os.chown(bob.directory, 0, 0)
    bob.output.chmod(mode)
    image = bob.image(place, me())
    if changed != 'refuse':
        with bob.output.open('ab') as log:
            log.write(b' and more')
    pid = restored(place, image, changed_files=changed)
    try:
        assert Path(f'/proc/{pid}/fd/1').readlink() == bob.output
        assert bob.output.read_bytes() == (b'so far and more' if changed == 'accept' else b'so far')
        assert (bob.output.stat().st_uid, bob.output.stat().st_mode & 0o777) == (0, mode)
    finally:
        end(pid)


def test_a_rollback_of_roots_log_is_undone_by_roots_rights(place: Place, bob: Bob) -> None:
    os.chown(bob.output, 0, 0)
    bob.output.chmod(0o600)
    image = bob.image(place, me())
    bob.output.write_bytes(b'another thing')
    with DirectWorker(env={'CKPTD_FAULT': 'place-keep-file-done=error:EIO'}) as worker, pytest.raises(CkptError):
        worker.run(place.request(0, operation='restore', image=image.name, changed_files='rollback'))
    assert bob.output.read_bytes() == b'another thing'
    assert not place.freezes
