# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records that are sound bytes and cannot be: verify tells of them, and a reader takes none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from ckptd.errors import ImageDamaged
from ckptd.image import records as r
from ckptd.image.grammar import Record
from ckptd.image.reader import ImageReader
from ckptd.image.verify import verify
from ckptd.objects.files.content import ContentSegment
from ckptd.objects.files.epoll import Watch
from ckptd.objects.files.locks import EOF, FLOCK, LEASE, OFD, POSIX, Lock
from ckptd.objects.files.registry import BY_TAG
from ckptd.objects.files.sound import flaws
from tests.unit.image.samples import PAGE, task, tree_records, write_image

CREDENTIALS = r.Credentials(7, (0,) * 4, (0,) * 4, (), (0,) * 5, 0, 0, 0)
SCHEDULING = r.Scheduling(7, 0, 0, 20, 0, 0, 0, 0, b'\1', 0, 50_000)
LIMITS = (r.Limit(1, 1),) * 16
TIMER = r.PosixTimer(0, 0, 0, 14, 0, 0, 0, 0, 0)
FILE = r.SavedFile(2, 'chardev', 0, 0, 0o20666, 0, 0, 0, '/dev/null', b'x')
SHARED = r.SharedMemory(1, r.MEMFD, PAGE, 'x', 0, 0o777, 0, 0, 0, 0)
BACKING = r.Backing(1, '/nowhere', 1, 2, 3, 4, 0o100644, 1, ())
MM = r.Mm(1, (0,) * 11, b'', 0, 1, 0)
HUGE = 1 << 63
IMPOSSIBLE = [
    (replace(CREDENTIALS, uids=()), 'Credentials 7: uids has 0 items, not 4'),
    (replace(CREDENTIALS, gids=(0,) * 5), 'Credentials 7: gids has 5 items, not 4'),
    (replace(CREDENTIALS, capabilities=(0,) * 4), 'Credentials 7: capabilities has 4 items, not 5'),
    (r.Limits(7, ()), 'Limits 7: limits has 0 items, not 16'),
    (r.Limits(7, LIMITS * 2), 'Limits 7: limits has 32 items, not 16'),
    (r.Limits(7, (r.Limit(2, 1), *LIMITS[1:])), 'Limits 7: limit 0 is 2, above its hard limit 1'),
    (r.IntervalTimers(7, ()), 'IntervalTimers 7: timers has 0 items, not 3'),
    (r.SignalActions(1, ()), 'SignalActions 1: actions has 0 items, not 64'),
    (replace(MM, layout=()), 'Mm 1: layout has 0 items, not 11'),
    (r.ThreadSignals(7, 0, 0, 2, 0, (b'',)), 'ThreadSignals 7: pending has an item that is not of 128 bytes'),
    (r.ProcessState(7, 0, 1000, (bytes(127),), 0, 0),
     'ProcessState 7: shared_pending has an item that is not of 128 bytes'),
    (r.ProcessState(7, 0, 2001, (), 0, 0), 'ProcessState 7: oom_score_adj is 2001, above 2000'),
    (replace(SCHEDULING, nice=40), 'Scheduling 7: nice is 40, above 39'),
    (r.Registers(7, 62, bytes(215), b''), 'Registers 7: gpr has 215 bytes, not 216'),
    (r.PosixTimers(7, (replace(TIMER, notify=8),)),
     'PosixTimers 7: a timer with an impossible notification or number'),
    (r.Fs(1, '', '/', 0), 'Fs 1: a directory without a name'),
    (r.Fs(1, '/a\0b', '/', 0), 'Fs 1: cwd has a zero byte'),
    (replace(FILE, owner_type=3), 'SavedFile 2: owner_type is 3, above 2'),
    (replace(FILE, owner_signal=65), 'SavedFile 2: owner_signal is 65, above 64'),
    (r.FdTable(1, (r.Fd(0, 0, 0),)), 'FdTable 1: an fd without a file'),
    (r.FdTable(1, (r.Fd(0, 1, 0), r.Fd(0, 1, 0))), 'FdTable 1: an fd number that is there twice or is too large'),
    (replace(SHARED, size=HUGE), f'SharedMemory 1: size is {HUGE}, above {HUGE - 1}'),
    (replace(BACKING, size=HUGE), f'Backing 1: size is {HUGE}, above {HUGE - 1}'),
    (replace(BACKING, content=(r.Extent(0, 0, 1), r.Extent(0, 0, 1))), 'Backing 1: its content is not in whole pages'),
]


def image_with(spool: Path, one: Record) -> Path:
    """An image in which this record is instead of those of its class."""
    parts = tree_records(task())
    parts['MEM '] = [MM, SHARED, BACKING]
    code = list(r.PARTS)[one.tag >> 8]
    parts[code] = [*(other for other in parts[code] if type(other) is not type(one)), one]
    if isinstance(one, r.SavedFile):
        parts[code].append(replace(FILE, file_id=1))
    return write_image(spool, parts, [bytes(PAGE)])


@pytest.mark.parametrize(('one', 'damage'), IMPOSSIBLE, ids=lambda value: type(value).__name__)
def test_a_record_that_cannot_be(spool: Path, one: Record, damage: str) -> None:
    image = image_with(spool, one)
    assert verify(image) == [damage]
    with ImageReader(image) as reader, pytest.raises(ImageDamaged, match=type(one).__name__) as caught:
        reader.every(type(one))
    assert caught.value.message.endswith(damage.partition(': ')[2])


@pytest.mark.parametrize(('change', 'damage'), [
    (lambda ids: replace(ids, vtgid=(7, 0)), 'tree.img: task 8 does not follow the leader 0 of its process'),
    (lambda ids: replace(ids, vpid=(8, 7), vtgid=(7, 7)),
     'tree.img: task 8 does not follow the leader 7 of its process'),
])
def test_threads_without_a_leader(spool: Path, change: Callable[[r.TaskIds], r.TaskIds], damage: str) -> None:
    parts = tree_records(task(), task(8))
    parts['MEM '] = [MM]
    parts['TREE'][1] = change(parts['TREE'][1])  # type: ignore[arg-type]
    image = write_image(spool, parts, [bytes(PAGE)], tasks=2)
    assert damage in verify(image)
    with ImageReader(image) as reader, pytest.raises(ImageDamaged, match='does not follow the leader'):
        _ = reader.tasks


@pytest.mark.parametrize('parents', [(7, 0), (8, 7)])
def test_a_task_that_comes_before_its_parent(spool: Path, parents: Sequence[int]) -> None:
    """Or is its own, or the parent of its parent: no walk from the root would come to it."""
    parts = tree_records(task(parent=parents[0]), task(8, parent=parents[1]))
    parts['MEM '] = [MM]
    image = write_image(spool, parts, [bytes(PAGE)], tasks=2)
    assert verify(image) == [f'tree.img: task 7 does not follow its parent {parents[0]}']
    with ImageReader(image) as reader, pytest.raises(ImageDamaged, match='does not follow its parent'):
        _ = reader.tasks


# ---------------------------------------------------------------- payloads of open files

LOCK = Lock(POSIX, 0, 0, EOF, 7)


def payload(tag: str, **fields: Any) -> Any:
    """A record of a kind, sound but for these fields."""
    record = BY_TAG[tag].record
    sound: dict[type, Any] = {str: '/x', int: 0, bytes: b''}
    hints = get_type_hints(record)
    sound_fields = {name: sound.get(hint, ()) for name, hint in hints.items() if name[0] != '_'}
    return record(**sound_fields | ({'link': ''} if 'link' in hints else {}) | fields)


@pytest.mark.parametrize(('one', 'flaw'), [
    (payload('regular', size=HUGE), f'size is {HUGE}, above {HUGE - 1}'),
    (payload('regular', path='/a\0'), 'path has a zero byte'),
    (payload('regular', content=(ContentSegment(HUGE, r.Extent(0, 0, 1)),)), f'its content is at byte {HUGE}'),
    (payload('regular', saved=(ContentSegment(0, r.Extent(0, 1, 1)),)), 'bytes 1 to 2 are not in data-0.img'),
    *((payload('regular', link=link), f'link is {link!r}, which is not the path of a file')
      for link in ('other', '.x.ckptd-0123456789abcdef', '/a/../.x.ckptd-0123456789abcdef', '/\udcff')),
    (payload('memfd', size=HUGE), f'size is {HUGE}, above {HUGE - 1}'),
    (payload('epoll', watches=(Watch(1, 1 << 31, 1, 0, 0),)), f'fd is {1 << 31}, above {(1 << 31) - 1}'),
    (payload('memfd', name='a\0'), 'name has a zero byte'),
    (payload('memfd', content=(ContentSegment(0, r.Extent(9, 0, 1)),)), 'bytes 0 to 1 are not in data-9.img'),
    (payload('pipe', capacity=1 << 31), f'capacity is {1 << 31}, above {(1 << 31) - 1}'),
    (payload('pipe', data=(r.Extent(0, 0, PAGE + 1),)), 'bytes 0 to 4097 are not in data-0.img'),
    (payload('fifo', path='\0'), 'path has a zero byte'),
    (payload('directory', locks=(replace(LOCK, kind=5),)), f'a lock of kind 5 on bytes 0 to {EOF}'),
    (payload('regular', locks=(replace(LOCK, kind=FLOCK, start=2, end=1),)), 'a lock of kind 2 on bytes 2 to 1'),
    (payload('memfd', locks=(replace(LOCK, kind=OFD, end=HUGE),)), f'a lock of kind 3 on bytes 0 to {HUGE}'),
    (payload('regular', locks=(replace(LOCK, breaking=1),)), 'a lock of kind 1 that is being broken to 1'),
    (payload('regular', locks=(replace(LOCK, kind=LEASE, breaking=3),)), 'a lock of kind 4 that is being broken to 3'),
    (payload('regular', locks=(replace(LOCK, kind=LEASE, breaking=1),)), 'a lock of kind 4 that is being broken to 1'),
], ids=lambda value: type(value).__name__)
def test_a_payload_that_cannot_be(one: Any, flaw: str) -> None:
    assert list(flaws(one, lambda name: PAGE if name == 'data-0.img' else 0)) == [flaw]


def test_payloads_that_can_be() -> None:
    broken = replace(LOCK, kind=LEASE, write=1, breaking=1)
    for one in (payload('regular', locks=(LOCK,), content=(ContentSegment(HUGE - 2, r.Extent(0, 0, 1)),)),
                payload('regular', locks=(broken, replace(broken, write=0, breaking=2))), payload('pipe')):
        assert list(flaws(one, lambda name: PAGE)) == []
