# SPDX-License-Identifier: LGPL-2.1-or-later
"""Words for how a file has changed."""

import os
import stat
import time

import pytest

from ckptd.image.identity import FileIdentity, changes
from ckptd.image.records import Backing

THEN = 1_600_000_000 * 10**9
SAVED = FileIdentity(stat.S_IFREG | 0o644, 5, 5000, THEN)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TZ', 'UTC')
    time.tzset()


def found(mode: int = SAVED.mode, inode: int = 5, size: int = 5000, mtime: int = THEN,
          device: int = 1) -> os.stat_result:
    times = (0, mtime // 10**9, 0, 0.0, mtime / 10**9, 0.0, 0, mtime, 0)
    return os.stat_result((mode, inode, device, 1, 0, 0, size, *times))


CHANGES = {
    'nothing': (found(), []),
    'another device, as after a reboot': (found(device=9), []),
    'permissions': (found(stat.S_IFREG | 0o600), []),
    'gone': (None, ['is missing']),
    'another type': (found(stat.S_IFDIR | 0o755, 7), ['is no longer a regular file']),
    'another file': (found(inode=7), ['is another file (inode 7, not 5)']),
    'size': (found(size=9000), ['has 9,000 bytes, not 5,000']),
    'time': (found(mtime=THEN + 3600 * 10**9),
             ['was written at 2020-09-13 13:26:40, not at 2020-09-13 12:26:40 (mtime)']),
    'time within the second': (found(mtime=THEN + 7),
                               ['was written at 2020-09-13 12:26:40.000000007, not at '
                                '2020-09-13 12:26:40.000000000 (mtime)']),
    'all': (found(inode=7, size=1, mtime=0), ['is another file (inode 7, not 5)', 'has 1 bytes, not 5,000',
                                             'was written at 1970-01-01 00:00:00, not at 2020-09-13 12:26:40 (mtime)']),
}


@pytest.mark.parametrize(('now', 'words'), CHANGES.values(), ids=CHANGES)
def test_changes(now: os.stat_result | None, words: list[str]) -> None:
    assert changes(SAVED, now) == words


def test_of_a_file_that_is_made_up_only_its_being_there_counts() -> None:
    made_up = SAVED._replace(made_up=True)
    assert changes(made_up, found(inode=9, size=1, mtime=0)) == []
    assert changes(made_up, None) == ['is missing']


def test_of_a_device_only_its_type_counts() -> None:
    device = FileIdentity(stat.S_IFCHR | 0o666, 5, 0, 0)
    assert changes(device, found(stat.S_IFCHR | 0o666, 8)) == []
    assert changes(device, found()) == ['is no longer a character device']


def test_what_a_strange_image_may_say() -> None:
    assert changes(SAVED._replace(mtime=2**64 - 1), found()) == [
        'was written at 2020-09-13 12:26:40, not at 2554-07-21 23:34:33 (mtime)']
    assert changes(SAVED._replace(mode=0), found()) == ['is no longer a file of this type']


def test_of_a_mapped_file() -> None:
    backing = Backing(1, '/lib/x', 2, 5, 5000, THEN, SAVED.mode, 0, ())
    assert FileIdentity.of_backing(backing) == SAVED
