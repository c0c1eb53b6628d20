# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that a restart made or changed: what a recovery puts back, and what it lets alone."""

import os
import tempfile
from pathlib import Path

import pytest

from ckptd.errors import CkptError
from ckptd.journal import Journal, recover
from ckptd.journal.entry import JournalEntry
from ckptd.journal.recover import left_about_files
from ckptd.journal.steps import KeepFile, MakeFile
from ckptd.journal.steps.files import keep

NOW = b'now' * 5000
MTIME = 1_600_000_000_123_456_789
NOBODY = 65534


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / 'run')


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / 'file'
    path.write_bytes(NOW)
    os.utime(path, ns=(0, MTIME))
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / 'kept'


def made(path: Path, *, known: bool = False, uid: int | None = None) -> MakeFile:
    of = path.stat() if known else None
    return MakeFile(str(path), of.st_dev if of else 0, of.st_ino if of else 0, os.geteuid() if uid is None else uid,
                    os.getegid() if uid is None else uid, ())


def keep_it(entry: JournalEntry, path: Path, kept: Path, start: int = 0) -> None:
    entry.add(made(kept))
    with path.open('rb') as source, kept.open('x+b') as target:
        keep(source.fileno(), start, target.fileno())
    of = path.stat()
    entry.add(KeepFile(str(path), of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, start, str(kept)))


CHANGES = {'longer': lambda file: file.write(b'x' * 100_000), 'shorter': lambda file: file.truncate(3),
           'written': lambda file: file.write(b'x'), 'nothing': lambda file: None}


@pytest.mark.parametrize('start', [0, 4099, len(NOW)])
@pytest.mark.parametrize('change', CHANGES)
def test_a_kept_file_is_put_back(journal: Journal, path: Path, kept: Path, change: str, start: int) -> None:
    entry, inode = journal.begin(1, 'image x', 'restore'), path.stat().st_ino
    keep_it(entry, path, kept, start)
    with path.open('r+b') as file:
        file.seek(start)
        if change != 'shorter' or not start:
            CHANGES[change](file)
    entry.close()
    assert left_about_files(journal)
    assert recover(journal) == []           # not here
    report = recover(journal, files=True)
    assert len(report) == 2
    assert f'undone rolling back {path}' in report[0]
    assert path.read_bytes() == NOW
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (inode, MTIME)
    assert not kept.exists()
    assert journal.entries() == []
    assert not left_about_files(journal)


def test_holes_stay_holes(journal: Journal, path: Path, kept: Path) -> None:
    os.truncate(path, 64 << 20)
    entry = journal.begin(1, 'image x', 'restore')
    keep_it(entry, path, kept)
    assert kept.stat().st_blocks * 512 < 1 << 20
    path.write_bytes(bytes(8 << 20))
    entry.close()
    recover(journal, files=True)
    assert path.stat().st_size == 64 << 20
    assert path.stat().st_blocks * 512 < 1 << 20
    assert path.read_bytes().rstrip(b'\0') == NOW


def test_room_is_asked_for_before_anything_is_written(path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all of it, and again for each piece: holes may be filled meanwhile. Holes themselves need none."""
    monkeypatch.setattr('ckptd.journal.steps.files._PIECE', 1 << 20)
    with path.open('r+b') as file:
        file.truncate(3 << 20)
        os.pwrite(file.fileno(), b'x' * 4096, 1 << 20)
    asked: list[tuple[int, int]] = []
    with path.open('r+b') as source, kept.open('x+b') as target:
        def room(size: int) -> None:
            asked.append((size, os.fstat(target.fileno()).st_size))
            if len(asked) == 2:
                os.pwrite(source.fileno(), b'y' * 8192, 2 << 20)
        keep(source.fileno(), 0, target.fileno(), room)
    block = -(-len(NOW) // 4096) * 4096
    assert [size for size, _ in asked] == [block + 4096, 4096, 8192]
    assert asked[0][1] == 0
    assert kept.read_bytes() == path.read_bytes()


def test_a_file_that_was_replaced_is_somebody_elses(journal: Journal, path: Path, kept: Path) -> None:
    entry = journal.begin(1, 'image x', 'restore')
    keep_it(entry, path, kept)
    path.rename(path.with_name('old'))
    path.write_bytes(b'new')
    entry.close()
    recover(journal, files=True)
    assert path.read_bytes() == b'new'
    path.unlink()
    path.symlink_to('old')


def test_the_copy_stays_where_it_cannot_be_put_back(journal: Journal, path: Path, kept: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the only one then. The next recovery tries again."""
    def full(source: int, start: int, length: int, target: int, offset: int) -> int:
        raise OSError(28, 'No space left on device')
    entry = journal.begin(1, 'image x', 'restore')
    keep_it(entry, path, kept)
    path.write_bytes(b'half')
    entry.close()
    with monkeypatch.context() as patched:
        patched.setattr('ckptd.journal.steps.files.copy_with_holes', full)
        report = recover(journal, files=True)
    assert f'cannot undo rolling back {path}, whose content is in {kept}: ' in report[0]
    assert kept.read_bytes() == NOW
    recover(journal, files=True)
    assert path.read_bytes() == NOW
    assert not kept.exists()


def test_a_half_copy_is_removed(journal: Journal, path: Path, kept: Path) -> None:
    entry = journal.begin(1, 'image x', 'restore')
    entry.add(made(kept))
    kept.write_bytes(NOW[:100])
    entry.close()
    recover(journal, files=True)
    assert path.read_bytes() == NOW
    assert not kept.exists()


def test_a_made_file_goes_while_it_is_the_same(journal: Journal, path: Path) -> None:
    entry = journal.begin(1, 'image x', 'restore')
    entry.add(made(path, known=True))
    entry.close()
    recover(journal, files=True)
    assert not path.exists()
    path.write_bytes(NOW)
    entry = journal.begin(1, 'image x', 'restore')
    entry.add(made(path, known=True))
    path.rename(path.with_name('old'))
    path.write_bytes(b'another')
    entry.close()
    recover(journal, files=True)
    assert path.read_bytes() == b'another'


@pytest.mark.needs('root')
def test_a_made_file_goes_by_its_users_rights(journal: Journal) -> None:
    """A directory that is another one's meanwhile is safe from us."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, 'file')
        path.write_bytes(NOW)
        Path(name).chmod(0o755)
        entry = journal.begin(1, 'image x', 'restore')
        entry.add(made(path, known=True, uid=NOBODY))
        entry.close()
        groups = os.getgroups()
        assert 'cannot undo making file' in recover(journal, files=True)[0]
        assert path.exists()
        assert os.getgroups() == groups
        Path(name).chmod(0o777)
        recover(journal, files=True)
        assert not path.exists()


@pytest.mark.needs('root')
def test_a_file_is_put_back_by_its_users_rights(journal: Journal) -> None:
    """Who may write root's program and is not root takes its set-user-ID away by that."""
    with tempfile.TemporaryDirectory() as name:
        path, kept = Path(name, 'file'), Path(name, 'kept')
        path.write_bytes(NOW)
        path.chmod(0o4777)
        Path(name).chmod(0o755)
        entry = journal.begin(1, 'image x', 'restore')
        keep_it(entry, path, kept)
        [(number, step)] = [(number, step) for number, step in entry.standing() if isinstance(step, KeepFile)]
        entry.undone(number)
        entry.add(KeepFile(step.path, step.device, step.inode, step.size, step.mtime, step.start, step.kept, NOBODY,
                           NOBODY, ()))
        with path.open('r+b') as file:
            file.write(b'then')
        path.chmod(0o4777)
        entry.close()
        recover(journal, files=True)
        assert path.read_bytes() == NOW
        assert (path.stat().st_uid, path.stat().st_mode & 0o7777) == (0, 0o777)


def test_a_name_that_is_no_text(journal: Journal) -> None:
    entry = journal.begin(1, 'image x', 'restore')
    with pytest.raises(CkptError, match='a name is not UTF-8'):
        entry.add(MakeFile('/tmp/\udcff', 0, 0, 0, 0, ()))
    entry.finish()


def test_several_are_undone_at_once(journal: Journal, path: Path, kept: Path) -> None:
    """What is not to be undone any more is written in one piece."""
    entry = journal.begin(1, 'image x', 'restore')
    keep_it(entry, path, kept)
    entry.undone(0, 1)
    assert entry.standing() == []
    assert journal.entries()[0].steps == ()
    entry.finish()
