# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's files: read back as written, and never believed."""

import errno
import os
import resource
import signal
import stat
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import CkptError
from ckptd.journal import Journal, recover
from ckptd.journal.entry import JournalEntry, parse_entry
from ckptd.journal.steps import (
    AnyStep,
    BindSocket,
    Born,
    DropPackets,
    EndProcesses,
    EndUsersProcesses,
    FreezeCgroup,
    FreezeUnit,
    HeldSocket,
    KeepFile,
    Known,
    Lifetime,
    LinkFile,
    MakeCgroup,
    MakeFile,
    MakeHome,
    MakeSegment,
    MakeSystemV,
    Move,
    Moved,
    RepairSockets,
    StepContext,
    TakeFromTerminal,
    ThawUnit,
    WalkQueues,
)
from ckptd.kernel.task import boot_id

BEGIN = b'{"type":"Begin","version":1,"boot":"%s","job":1,"target":"x","mode":"cgroup"}\n' % boot_id().encode()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / 'run')


def abandon(journal: Journal, data: bytes, name: str = '1-ab') -> Path:
    """An entry whose owner is dead."""
    journal.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = journal.directory / f'{name}.jsonl'
    path.write_bytes(data)
    return path


def test_steps_are_read_back(journal: Journal) -> None:
    entry = journal.begin(3, 'process 4', 'cgroup')
    steps = [MakeCgroup('/a/ckptd-3-ab'), FreezeCgroup('/a/ckptd-3-ab'),
             Move('/a/ckptd-3-ab', (Moved(5, 6, '/a'), Moved(7, 8, '/a/b'))), FreezeUnit('x.service')]
    for step in steps:
        entry.add(step)
    entry.undone(1)
    listing, = journal.entries()
    assert (listing.name, listing.alive, listing.begin.job) == (entry.name, True, 3)
    assert listing.steps == (steps[0], steps[2], steps[3])
    entry.redone(1)
    assert journal.entries()[0].steps == tuple(steps)
    assert entry.origins() == {5: Moved(5, 6, '/a'), 7: Moved(7, 8, '/a/b')}
    entry.finish()
    entry.finish()
    assert journal.entries() == []


def test_each_step_has_a_name_of_its_own_and_an_undo() -> None:
    steps = get_args(AnyStep)
    assert len({step.point for step in steps} - {''}) == len(steps)
    assert [step.__name__ for step in steps if not {'describe', '_undo'} <= vars(step).keys()] == []


def test_steps_that_last_as_long_as_the_tree_are_kept(journal: Journal) -> None:
    """A file that only the journal names is removed also when the tree lives."""
    entry = journal.begin(1, 'image x', 'restore')
    work, temporary = '/a/ckptd-1-ab', MakeFile('/a/.b.tmp', 0, 0, 0, 0, ())
    undone = [MakeCgroup(work), FreezeCgroup(work), Move(work, ()), temporary, EndProcesses((Known(5, 6),)),
              LinkFile('/a/b', 1, 2, '/spool/x', 0, 0, ()), WalkQueues((), ()), TakeFromTerminal(1, 2, 3, 4, b''),
              EndUsersProcesses((Known(5, 6),)),
              RepairSockets((HeldSocket(1, 2, 3),)), DropPackets('ckptd-0123456789abcdef')]
    kept = [Born(work), MakeHome('/a/c'), MakeSegment(1, 2, 3), MakeSystemV(1, 2, is_queue=True),
            MakeFile('/a/b', 1, 2, 0, 0, ()),
            KeepFile('/a/b', 1, 2, 3, 4, 5, '/kept'), BindSocket('/a/s', '/a/.s.0', 1, 2)]
    for step in (*undone, *kept):
        entry.add(step)
    entry.keep(Lifetime.TREE)
    assert [step for _, step in reversed(entry.standing())] == undone
    assert [step for _, step in entry.released()] == kept
    entry.finish()


def test_directory_is_ours_alone(journal: Journal) -> None:
    entry = journal.begin(1, 'x', 'ptrace')
    assert stat.S_IMODE(journal.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(journal.directory.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o600
    entry.finish()
    journal.directory.chmod(0o777)
    with pytest.raises(CkptError, match='not writable by other users'):
        journal.begin(1, 'x', 'ptrace')
    journal.directory.chmod(0o700)


def test_half_a_line_is_a_step_that_was_never_taken() -> None:
    contents = parse_entry(BEGIN + b'{"type":"FreezeCgroup","cgroup":"/a"}\n{"type":"FreezeCgroup","cgroup":"/b"')
    assert contents.steps == [FreezeCgroup('/a')]
    assert contents.damaged == 0


@pytest.mark.parametrize('line', [
    b'{"type":"FreezeCgroup","cgroup":"/a/../../etc"}', b'{"type":"FreezeCgroup","cgroup":"a"}',
    b'{"type":"FreezeCgroup","cgroup":"/.."}', b'{"type":"FreezeCgroup","cgroup":"/a\\u0000b"}',
    b'{"type":"FreezeCgroup","cgroup":1}', b'{"type":"MakeCgroup","cgroup":"/system.slice"}',
    b'{"type":"MakeCgroup","cgroup":"/a/ckptd-tests-1"}', b'{"type":"Move","to":"/a","processes":[]}',
    b'{"type":"Move","to":"/ckptd-1-ab","processes":[[0,1,"/a"]]}', b'{"type":"FreezeUnit","unit":"../x"}',
    b'{"type":"RemoveAll"}', b'[]', b'', b'\xff', b'{"type":"Begin"}', b'{"type":"Undone","step":-1}',
])
def test_damaged_line_is_passed_over(line: bytes) -> None:
    contents = parse_entry(BEGIN + line + b'\n{"type":"FreezeCgroup","cgroup":"/b"}\n{"type":"Undone","step":7}\n')
    assert contents.steps == [None, FreezeCgroup('/b')]
    assert contents.damaged == 1


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    parse_entry(BEGIN + data)
    with pytest.raises(ValueError):
        parse_entry(b'x' + data)


@pytest.mark.parametrize('data', [b'', b'{}', b'\n\n', BEGIN.replace(b':1,', b':99,'), BEGIN[:-5], b'\0' * 4096],
                         ids=['empty', 'no type', 'no line', 'newer', 'cut', 'zeros'])
def test_file_that_says_nothing_is_removed(journal: Journal, data: bytes) -> None:
    path = abandon(journal, data)
    report = recover(journal)
    assert not path.exists()
    assert len(report) == 1
    assert path.name in report[0]


def test_damage_does_not_keep_the_rest_from_being_undone(journal: Journal) -> None:
    thawed: list[str] = []
    first, last = (b'{"type":"FreezeUnit","unit":"%s.service"}\n' % name for name in (b'a', b'b'))
    abandon(journal, BEGIN + first + b'???\n' + last)
    report = recover(journal, thawed.append)
    assert thawed == ['b.service', 'a.service']
    assert '1 damaged lines' in report[0]
    assert journal.entries() == []


def test_entry_of_an_earlier_boot_is_not_believed(journal: Journal) -> None:
    thawed: list[str] = []
    abandon(journal, BEGIN.replace(boot_id().encode(), b'another') + b'{"type":"FreezeUnit","unit":"a.service"}\n')
    assert 'earlier boot' in recover(journal, thawed.append)[0]
    assert thawed == []


def test_what_cannot_be_undone_is_tried_again(journal: Journal) -> None:
    def no(unit: str) -> None:
        raise OSError(errno.ETIMEDOUT, 'no answer')

    path = abandon(journal, BEGIN + b'{"type":"FreezeUnit","unit":"a.service"}\n'
                                    b'{"type":"ThawUnit","unit":"b.service"}\n')
    assert 'cannot undo freezing unit a.service' in '\n'.join(recover(journal, no))
    assert path.exists()
    calls: list[tuple[str, str]] = []
    recover(journal, lambda unit: calls.append(('thaw', unit)), lambda unit: calls.append(('freeze', unit)))
    assert calls == [('freeze', 'b.service'), ('thaw', 'a.service')]
    assert not path.exists()


def test_links_and_other_files_are_not_read(journal: Journal, tmp_path: Path) -> None:
    secret = tmp_path / 'secret'
    secret.write_bytes(BEGIN)
    abandon(journal, BEGIN)
    (journal.directory / '2-ab.jsonl').symlink_to(secret)
    os.mkfifo(journal.directory / '3-ab.jsonl')
    (journal.directory / 'README').write_text('no entry')
    recover(journal)
    assert secret.read_bytes() == BEGIN
    assert [path.name for path in journal.directory.iterdir()] == ['README']


def test_cgroup_that_is_gone_needs_no_thaw(tmp_path: Path) -> None:
    step = FreezeCgroup('/gone')
    entry = JournalEntry(tmp_path / 'x.jsonl', -1, parse_entry(BEGIN)._replace(steps=[step, ThawUnit('x.service')]))
    calls: list[str] = []
    assert entry.undo(StepContext(None, freeze_unit=calls.append)) == []
    assert calls == ['x.service']


def test_full_file_system_fails_before_the_step(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = journal.begin(1, 'x', 'cgroup')
    size = entry.path.stat().st_size
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(CkptError, match='cannot write the freeze journal'):
            entry.add(FreezeCgroup('/a/long/name/of/a/cgroup'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert entry.path.stat().st_size == size
    assert entry.standing() == []
    entry.finish()
