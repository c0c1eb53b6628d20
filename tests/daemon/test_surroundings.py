# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's surroundings: notification socket, watchdog, log, directories, options of methods."""

import logging
import os
import socket
from pathlib import Path

import pytest

from ckptd import logs
from ckptd.bus.options import CHECKPOINT, NONE, parse_options
from ckptd.errors import CkptError, InvalidArgument, NotSupported
from ckptd.notify import ServiceManager
from ckptd.places import Places, prepare_runtime


@pytest.mark.parametrize('abstract', [False, True])
def test_notify_over_a_real_socket(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f'@ckptd-test-{os.getpid()}' if abstract else str(tmp_path / 'notify')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(name.replace('@', '\0'))
        monkeypatch.setenv('NOTIFY_SOCKET', name)
        starter = ServiceManager.take()
        assert 'NOTIFY_SOCKET' not in os.environ
        assert starter.notify('READY=1', 'STATUS=here')
        assert server.recv(100) == b'READY=1\nSTATUS=here'


def test_a_service_manager_that_does_not_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / 'notify'))
        starter = ServiceManager(str(tmp_path / 'notify'))
        assert not all(starter.notify('WATCHDOG=1') for _ in range(1000))


def test_nobody_to_notify(tmp_path: Path) -> None:
    assert not ServiceManager().notify('READY=1')
    assert not ServiceManager(str(tmp_path / 'nobody')).notify('READY=1')


@pytest.mark.parametrize(('usec', 'pid', 'interval'), [
    ('3000000', '', 1.5), ('3000000', 'own', 1.5), ('3000000', '1', None), ('', '', None), ('0', '', None),
    ('soon', '', None),
])
def test_watchdog(usec: str, pid: str, interval: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WATCHDOG_USEC', usec)
    monkeypatch.setenv('WATCHDOG_PID', str(os.getpid()) if pid == 'own' else pid)
    assert ServiceManager.take().watchdog == interval


def test_journal_lines_have_their_priority() -> None:
    record = logging.LogRecord('ckptd.x', logging.ERROR, '', 0, 'two\nlines', None, None)
    assert logs.JournalFormatter('%(name)s: %(message)s').format(record) == '<3>ckptd.x: two\n<3>lines'


def test_the_journal_is_known_by_its_inode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / 'stream').open('w') as file:
        stat = os.fstat(file.fileno())
        monkeypatch.setenv('JOURNAL_STREAM', f'{stat.st_dev}:{stat.st_ino}')
        assert logs.is_journal(file.fileno())
        assert not logs.is_journal(0)


def test_a_users_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
    monkeypatch.setenv('XDG_RUNTIME_DIR', str(tmp_path / 'run'))
    assert Places.of(system=False) == Places(tmp_path / 'state/ckptd', tmp_path / 'run/ckptd')
    assert Places.of(system=True) == Places(Path('/var/spool/ckptd'), Path('/run/ckptd'))


@pytest.mark.skipif(Path(f'/run/user/{os.getuid()}').is_dir(), reason='this user has the directory')
def test_a_user_without_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('XDG_RUNTIME_DIR', raising=False)
    with pytest.raises(NotSupported, match='XDG_RUNTIME_DIR'):
        Places.of(system=False)


def test_the_runtime_directory_is_ours_alone(tmp_path: Path) -> None:
    prepare_runtime(tmp_path / 'a/b')
    assert (tmp_path / 'a/b').stat().st_mode & 0o777 == 0o700
    (tmp_path / 'a/b').chmod(0o777)
    with pytest.raises(CkptError, match='is writable by other users'):
        prepare_runtime(tmp_path / 'a/b')
    (tmp_path / 'file').touch()
    with pytest.raises(CkptError, match='Not a directory'):
        prepare_runtime(tmp_path / 'file/run')


def test_options_that_are_known() -> None:
    given = {'freeze': 'cgroup', 'after': 'kill', 'timeout': 5, 'handle_token': 'a_1'}
    assert parse_options(given, CHECKPOINT) == given
    assert parse_options({}, NONE) == {}


@pytest.mark.parametrize(('name', 'value', 'words'), [
    ('after', 'explode', 'one of resume, kill, freeze'), ('after', 1, 'one of'), ('timeout', 0, 'microseconds'),
    ('timeout', True, 'microseconds'), ('timeout', '5', 'microseconds'), ('timeout', 1 << 62, 'microseconds'),
    ('handle_token', 'a/b', '1 to 64 characters'), ('handle_token', '', '1 to 64'), ('freeze', [], 'one of auto'),
])
def test_values_that_an_option_cannot_have(name: str, value: object, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse_options({name: value}, CHECKPOINT)


def test_an_unknown_option_hears_of_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match='unknown option "aftr"') as caught:
        parse_options({'aftr': 'kill'}, CHECKPOINT)
    assert caught.value.hint == 'options here: freeze, after, force, timeout, save_files, save_limit, external, ' \
        'sysv, as_root, detach, handle_token'
