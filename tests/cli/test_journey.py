# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands one after the other on a real tree, as a user would give them."""

import asyncio
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.bus.client import connect
from ckptd.bus.names import BUS_NAME, MANAGER
from ckptd.bus.names import ROOT as OBJECT
from ckptd.errors import InvalidArgument
from ckptd.image.ids import is_image_id
from tests.cli.conftest import Ctl
from tests.lib.bus import ROOT, Daemon
from tests.lib.victim import Victim

pytestmark = pytest.mark.needs('dbus', 'ptrace')
NO_SUCH_IMAGE = '20240131_235959_sleep_3fa9'


@pytest.fixture
def tree(victim: Callable[..., Victim]) -> Victim:
    return victim('counter', '3')


@pytest.fixture
def image(ctl: Ctl, tree: Victim) -> str:
    """The id of an image of the tree."""
    done = ctl('checkpoint', str(tree.pid), '--quiet')
    assert (done.status, done.err) == (0, '')
    return done.out.strip()


@pytest.fixture
def with_a_socket() -> Iterator[int]:
    """A process that cannot be dumped yet."""
    with socket.create_server(('127.0.0.1', 0)) as server, subprocess.Popen(
            [sys.executable, '-c', f'import socket; s = socket.create_connection({server.getsockname()!r}); '
             'print(flush=True); input()'], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate(b'\n')


def test_a_tree_is_checked_checkpointed_and_runs_on(ctl: Ctl, tree: Victim) -> None:
    checked = ctl('check', str(tree.pid), '--json')
    assert (checked.status, checked.json['possible'], checked.json['refusals']) == (0, True, [])
    done = ctl('checkpoint', str(tree.pid), '--json')
    assert done.status == 0, done.err
    result = done.json
    assert is_image_id(result['image'])
    assert (result['tasks'], result['target']) == (4, f'pid:{tree.pid}')
    assert result['pages_written'] > 0
    assert 0 < result['frozen_time'] <= result['total_time']
    tree.finish()


def test_for_people_the_id_stands_alone_on_stdout(ctl: Ctl, tree: Victim) -> None:
    done = ctl('checkpoint', f'pid:{tree.pid}')
    assert is_image_id(done.out.strip())
    assert '4 tasks' in done.err
    assert 'The tree is as it was.' in done.err


def test_an_image_is_listed_shown_verified_and_removed(ctl: Ctl, tree: Victim, image: str) -> None:
    [listed] = ctl('list', '--json').json
    assert (listed['image'], listed['tasks'], listed['owner']) == (image, 4, ctl('show', image, '--json').json['owner'])
    assert ctl('list').out.splitlines()[-1] == '1 image listed.'
    assert ctl('list', '--no-legend').out.split()[0] == image
    shown = ctl('show', image)
    assert f'Image: {image}' in shown.out
    assert 'Frozen time: ' in shown.out
    verified = ctl('verify', image)
    assert (verified.status, verified.out) == (0, f'{image}: intact\n')
    assert ctl('remove', image).status == 0
    empty = ctl('list')
    assert (empty.status, empty.out, empty.err) == (0, '', 'No images.\n')


def test_the_tree_is_drawn_the_same_live_and_from_its_image(ctl: Ctl, tree: Victim, image: str) -> None:
    live, dumped = ctl('tree', str(tree.pid)), ctl('tree', image)
    assert (live.status, dumped.status) == (0, 0)
    shapes = [[line.split('  ')[0] for line in done.out.splitlines()] for done in (live, dumped)]
    assert shapes[0][:-1] == shapes[1][:-1]
    assert shapes[0][1].endswith(f' {tree.pid}')
    assert dumped.out.count('├─') == 2
    assert '/dev/null' in dumped.out
    files = ctl('tree', image, '--files', '--json').json[0]['fds']
    assert any(link.startswith('0 ') for link in files)


def test_a_core_of_every_process_is_exported(ctl: Ctl, tree: Victim, image: str, tmp_path: Path) -> None:
    cores = tmp_path / 'new' / 'cores'
    done = ctl('export', '--format', 'core', image, str(cores), '--json')
    assert done.status == 0, done.err
    names = {row['name'] for row in done.json['cores']}
    assert names == {path.name for path in cores.iterdir()}
    assert len(names) == 4
    assert f'core.{tree.pid}' in names
    assert all((cores / name).read_bytes()[:4] == b'\x7fELF' for name in names)
    again = ctl('export', image, str(cores))
    assert again.status == 1
    assert 'exists already' in again.err
    assert ctl('export', '--force', image, str(cores)).status == 0


def test_a_damaged_image_is_found_out(ctl: Ctl, image: str, spool: Path) -> None:
    part = spool / image / 'tasks.img'
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    done = ctl('verify', image, '--json')
    assert done.status == 6
    assert done.json[0]['intact'] is False
    assert done.json[0]['damages']


def test_kill_ends_the_tree_once_it_is_in_the_image(ctl: Ctl, tree: Victim) -> None:
    done = ctl('checkpoint', str(tree.pid), '--kill')
    assert done.status == 0, done.err
    assert 'The tree was killed.' in done.err
    [command] = [line for line in done.err.splitlines() if line.startswith('To bring it back: ')]
    assert re.fullmatch(rf'ckptctl restore {done.out.strip()} --address \S+', command.partition(': ')[2]), command
    assert tree.process.wait(10) == -9


def test_refusals_are_rows_and_the_status_says_refused(ctl: Ctl, with_a_socket: int) -> None:
    done = ctl('checkpoint', str(with_a_socket))
    assert (done.status, done.out) == (3, '')
    first, heading, *rows = done.err.splitlines()
    assert first.startswith('ckptctl: checkpoint: ')
    assert heading.split() == ['PID', 'COMMAND', 'RESOURCE', 'ERRNO', 'REASON']
    assert any(str(with_a_socket) in row and 'socket' in row for row in rows)
    assert rows[-1].startswith('hint: ')
    error = ctl('checkpoint', str(with_a_socket), '--json').json['error']
    assert error['refusals'][0]['pid'] == with_a_socket


def test_check_lists_refusals_on_stdout_with_the_same_status(ctl: Ctl, with_a_socket: int) -> None:
    done = ctl('check', str(with_a_socket))
    assert done.status == 3
    assert 'cannot be checkpointed' in done.out.splitlines()[-1]


def test_a_word_that_is_no_target_is_the_same_error_everywhere(daemon: Daemon, ctl: Ctl, standalone: Ctl) -> None:
    """From ckptctl, with a daemon and without, and from each method that takes a target."""
    def error(run: Ctl, command: str) -> tuple[str, str, str]:
        document = run(command, 'foo.bar', '--json').json['error']
        return document['name'], document['message'], document['hint']

    said = error(ctl, 'check')
    assert said[:2] == ('InvalidArgument', "'foo.bar' is not a target")
    assert 'ends in .service' in said[2]
    assert [error(standalone, command) for command in ('check', 'thaw')] == [said, said]

    async def call(member: str, signature: str, *arguments: object) -> tuple[str, str, str]:
        async with await connect(daemon.address) as client:
            with pytest.raises(InvalidArgument) as caught:
                await client.call(BUS_NAME, OBJECT, MANAGER, member, signature, *arguments)
        return caught.value.name, caught.value.message, caught.value.hint

    for member in ('Check', 'Scan', 'Checkpoint', 'Freeze', 'Thaw'):
        assert asyncio.run(call(member, 'sa{sv}', 'foo.bar', {})) == said
    assert asyncio.run(call('Inhibit', 'ssa{sv}', 'me', 'why', {'target': 'foo.bar'})) == said


@pytest.mark.parametrize(('args', 'status', 'words'), [
    (['show', NO_SUCH_IMAGE], 5, 'no image'),
    (['verify', 'nonsense'], 5, 'no image'),
    (['remove', NO_SUCH_IMAGE], 5, 'no image'),
    (['tree', NO_SUCH_IMAGE], 5, 'no image'),
    (['export', NO_SUCH_IMAGE, '/nonexistent/cores'], 5, 'no image'),
    (['cancel', '4711'], 5, 'no job 4711'),
    (['checkpoint', '4194305'], 5, 'no process 4194305'),
    (['check', 'no-such-unit.service'], 5, 'no-such-unit.service'),
    (['thaw', '1'], 5, 'not frozen'),
    (['check', 'pid:abc'], 2, 'pid:abc'),
    (['check', 'foo.bar'], 2, 'foo.bar'),
])
def test_what_is_not_there_is_said_in_one_line_and_a_hint(args: list[str], status: int, words: str, ctl: Ctl) -> None:
    done = ctl(*args)
    assert (done.status, done.out) == (status, '')
    first, hint = done.err.splitlines()
    assert first.startswith(f'ckptctl: {args[0]}: ')
    assert words in first
    assert hint.startswith('hint: ')
    assert not Path('/nonexistent').exists()
    document = ctl(*args, '--json').json
    assert document['error']['exit_status'] == status


@pytest.mark.parametrize(('args', 'status'), [
    (['--address', 'unix:path=/nonexistent/bus', 'list'], 69), (['lsit'], 2), (['checkpoint'], 2), ([], 2)])
def test_without_a_daemon_or_a_right_command_line(args: list[str], status: int) -> None:
    done = Ctl()(*args)
    assert (done.status, done.out) == (status, '')
    assert len(done.err.splitlines()) == 2


def test_a_bus_without_ckptd(private_bus: object) -> None:
    done = Ctl('--address', private_bus.address)('list')  # type: ignore[attr-defined]
    assert done.status == 69
    assert '--standalone' in done.err


def test_a_reader_that_goes_away_is_no_error(ctl: Ctl, image: str) -> None:
    process = ctl.start('list')
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ''
    process.stderr.close()
    assert process.wait(30) == 128 + 13


def test_help_needs_no_bus_and_imports_little() -> None:
    program = 'import sys; from ckptd.cli.main import main\ntry: main(["list", "--help"])\nexcept SystemExit: pass\n' \
              'print([m for m in ("rich", "dbus_next", "msgspec", "psutil") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == '[]'
