# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images as files, and programs that a checkpoint waits for: by ckptctl, with the real engine."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Ctl
from tests.lib.bus import ROOT, Daemon

pytestmark = pytest.mark.needs('dbus', 'ptrace')


@pytest.fixture
def sleeper() -> Iterator[str]:
    with subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        yield f'pid:{process.pid}'
        process.kill()


@pytest.fixture
def image(ctl: Ctl, sleeper: str) -> str:
    done = ctl('checkpoint', sleeper, '--quiet')
    assert done.status == 0, done.err
    return done.out.strip()


def test_an_image_goes_and_comes_back(ctl: Ctl, image: str, tmp_path: Path) -> None:
    file = tmp_path / 'image.tar'
    done = ctl('export', '--format', 'tar', image, str(file))
    assert (done.status, done.out) == (0, f'{file}\n'), done.err
    with tarfile.open(file) as archive:
        assert f'{image}/manifest.json' in archive.getnames()
    again = ctl('export', '--format', 'tar', image, str(file))
    assert again.status == 1
    assert 'hint: use --force to overwrite it' in again.err
    assert ctl('export', '--format', 'tar', '--force', image, str(file)).status == 0
    assert ctl('remove', image).status == 0
    done = ctl('import', str(file))
    assert (done.status, done.out) == (0, f'{image}\n'), done.err
    assert ctl('import', str(file), '--json').json['image'] != image
    assert [ctl('verify', one['image']).status for one in ctl('list', '--json').json] == [0, 0]


def test_through_a_pipe(daemon: Daemon, ctl: Ctl, image: str) -> None:
    command = f'{sys.executable} -m ckptd.cli'
    done = subprocess.run(['sh', '-c', f'{command} export --format tar {image} - --address {daemon.address} | '
                                       f'{command} import - --address {daemon.address}'],
                          capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert {one['image'] for one in ctl('list', '--json').json} == {image, done.stdout.strip()}


def test_what_is_no_image(ctl: Ctl, tmp_path: Path) -> None:
    file = tmp_path / 'image.tar'
    file.write_bytes(b'no tar at all' * 1000)
    done = ctl('import', str(file))
    assert done.status == 6
    assert 'hint' in done.err
    assert ctl('import', str(tmp_path / 'missing')).status == 1
    assert ctl('list', '--json').json == []


def test_files_that_cannot_be_used_have_a_hint(ctl: Ctl, image: str, tmp_path: Path) -> None:
    absent = str(tmp_path / 'no' / 'file.tar')
    for words, error, hint in (
            (('import', absent), 'No such file or directory', 'check the name'),
            (('export', '--format', 'tar', image, absent), 'No such file or directory', 'directory must exist'),
            (('export', '--format', 'tar', '--force', image, str(tmp_path)), 'Is a directory', 'give a file in it')):
        done = ctl(*words)
        assert done.status == 1
        assert error in done.err
        assert hint in done.err.partition('hint: ')[2]
    done = ctl('import', str(tmp_path))
    assert done.status != 0
    assert 'hint: ' in done.err, done.err


def test_a_program_that_a_checkpoint_waits_for(daemon: Daemon, ctl: Ctl, sleeper: str) -> None:
    command = [sys.executable, '-m', 'ckptd.cli']
    listing = ' '.join([*command, 'inhibitors', '--json', '--address', daemon.address])
    done = subprocess.run([*command, 'inhibit', '--address', daemon.address, '--who', 'me', '--why', 'to try it',
                           sleeper, 'sh', '-c', f'{listing}; exit 7'], capture_output=True, text=True,
                          cwd=ROOT, check=False)
    assert done.returncode == 7, done.stderr
    [one] = json.loads(done.stdout)
    assert (one['who'], one['why'], one['target']) == ('me', 'to try it', sleeper)
    assert ctl('inhibitors').err == 'No inhibitors.\n'


def test_a_program_that_is_not_there(daemon: Daemon, ctl: Ctl, sleeper: str) -> None:
    for program, status, said in ((['/no/such/program'], 1, '/no/such/program: No such file'),
                                  ([], 2, 'no program to run is given')):
        done = subprocess.run([sys.executable, '-m', 'ckptd.cli', 'inhibit', '--address', daemon.address, sleeper,
                               *program], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == status, done.stderr
        assert said in done.stderr
        assert 'hint: ' in done.stderr
        assert 'Traceback' not in done.stderr
