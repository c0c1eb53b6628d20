# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches of an ordinary user: the broker finds the files by handle, and tells only what the user reaches by path."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import pytest

from ckptd.errors import CkptError, PermissionDenied
from ckptd.image.reader import ImageReader
from ckptd.image.records import SavedFile
from ckptd.kernel.inotify import IN_ATTRIB, IN_CREATE, Inotify
from ckptd.objects.files.inotify import InotifyInstance
from ckptd.operation.context import JobContext
from ckptd.protocol.broker_calls import FindWatched
from ckptd.protocol.channel import Channel
from ckptd.worker.broker.answers import BrokerAnswers
from ckptd.worker.broker.identity import Identity
from tests.lib.bus import Served
from tests.security.attacker import Attacker, Program
from tests.worker.driver import Place

# it has none of the files open, and works elsewhere
WATCHER = f"""
home = os.getcwd()
os.makedirs('deep/below')
os.close(os.open('deep/below/file', os.O_CREAT | os.O_WRONLY))
fd = libc.inotify_init1(os.O_NONBLOCK)
assert libc.inotify_add_watch(fd, b'deep/below', {IN_CREATE}) == 1
assert libc.inotify_add_watch(fd, b'deep/below/file', {IN_ATTRIB}) == 2
os.rename('deep', 'moved')
ready()
wait_for_go()
os.chmod(home + '/moved/below/file', 0o600)
os.close(os.open(home + '/moved/below/new', os.O_CREAT | os.O_WRONLY))
found, data = [], os.read(fd, 4096)
while data:
    wd, mask, _, size = struct.unpack_from('iIII', data)
    found.append((wd, mask, data[16:16 + size].rstrip(b'\\0').decode()))
    data = data[16 + size:]
say(found)
"""
FOUND = str([(2, IN_ATTRIB, ''), (1, IN_CREATE, 'new')])


def test_a_users_watches_come_back(served: Served, attacker: Attacker) -> None:
    program = attacker.start(WATCHER)
    image = attacker.checkpoint(program, after='kill')
    with ImageReader(served.spool / image) as reader:
        [saved] = [one for one in reader.every(SavedFile) if one.kind == 'inotify']
        assert reader.manifest.owner_uid == attacker.uid
    home = program.directory
    assert [watch.path for watch in InotifyInstance.decode(saved.data).watches] == [
        f'{home}/moved/below', f'{home}/moved/below/file']
    outcome = attacker.restore(image)
    assert outcome.root == program.pid, outcome.words
    assert program.ask() == FOUND


def test_a_file_that_the_user_reaches_no_more(served: Served, attacker: Attacker) -> None:
    """Root has moved it into a directory of its own. Nobody tells the user where."""
    program = attacker.start(WATCHER)
    secret = program.directory / 'moved'
    os.chown(secret, 0, 0)
    secret.chmod(0o700)
    (secret / 'below').rename(secret / 'secret-name')
    with pytest.raises(CkptError) as caught:
        attacker.checkpoint(program)
    rows = caught.value.refusals
    assert sorted(row.reason.split(' of ')[0] for row in rows if row.severity == 'refusal') == ['watch 1', 'watch 2']
    assert 'secret-name' not in str(rows)


@contextmanager
def asked(attacker: Attacker, program: Program, tmp_path: Path, operation: str = 'checkpoint', worker: int = 0
          ) -> Iterator[BrokerAnswers]:
    """The answers of a broker of this user. worker: its pid."""
    job = JobContext(Place(tmp_path).make().request(program.pid, operation=operation), cast(Channel, None))
    with closing(BrokerAnswers(job, Identity(attacker.uid, attacker.uid, attacker.groups), worker)) as made:
        yield made


def test_what_a_worker_may_ask(attacker: Attacker, other: Attacker, tmp_path: Path) -> None:
    """About instances of processes that the user may inspect, and about its own files."""
    mine, theirs = attacker.start(WATCHER), other.start(WATCHER)
    [fd] = [int(path.name) for path in Path(f'/proc/{mine.pid}/fd').iterdir()
            if os.readlink(path) == 'anon_inode:inotify']  # noqa: PTH115
    below = os.fsencode(mine.directory / 'moved/below')
    both = [(1, below), (2, below + b'/file')]
    with asked(attacker, mine, tmp_path) as made:
        assert made.answer(FindWatched(mine.pid, fd, mine.pid)) == ({'paths': both, 'more': 0}, [])
        assert made.answer(FindWatched(mine.pid, fd, mine.pid, 1)) == ({'paths': both[1:], 'more': 0}, [])
        # also not about the broker itself, which is this process
        for pid in (theirs.pid, 1, os.getppid(), os.getpid()):
            with pytest.raises(PermissionError):
                made.answer(FindWatched(pid, fd, mine.pid))
        with pytest.raises(FileNotFoundError):
            made.answer(FindWatched(mine.pid, 999, mine.pid))
        with pytest.raises(OSError, match='not an inotify instance'):
            made.answer(FindWatched(mine.pid, 0, mine.pid))


def test_files_of_the_worker_itself(attacker: Attacker, tmp_path: Path, inotify: Callable[[Path], int]) -> None:
    """They are in flight in the tree, so that no process of the user has them. What is told of them is the same."""
    program = attacker.start(WATCHER)
    secret = attacker.own(attacker.home / 'secret', mode=0o700)
    os.chown(secret, 0, 0)
    (secret / 'file').touch()
    with asked(attacker, program, tmp_path, worker=os.getpid()) as made:
        reached = inotify(program.directory)
        assert made.answer(FindWatched(os.getpid(), reached, program.pid)) == (
            {'paths': [(1, os.fsencode(program.directory))], 'more': 0}, [])
        hidden = inotify(secret / 'file')
        assert made.answer(FindWatched(os.getpid(), hidden, program.pid)) == ({'paths': [], 'more': 0}, [])
        # in a directory that can be entered, but not listed, a name is a secret
        secret.chmod(0o711)
        assert made.answer(FindWatched(os.getpid(), hidden, program.pid)) == ({'paths': [], 'more': 0}, [])
        secret.chmod(0o755)
        told = {'paths': [(1, os.fsencode(secret / 'file'))], 'more': 0}
        assert made.answer(FindWatched(os.getpid(), hidden, program.pid)) == (told, [])


def test_other_jobs_do_not_ask(attacker: Attacker, tmp_path: Path) -> None:
    program = attacker.start(WATCHER)
    with asked(attacker, program, tmp_path, 'restore') as made, pytest.raises(PermissionDenied):
        made.answer(FindWatched(program.pid, 3, program.pid))


def test_more_watches_than_fit_into_an_answer(attacker: Attacker, tmp_path: Path) -> None:
    name = 'long' * 40
    program = attacker.start(f"""
os.mkdir('{name}')
fd = libc.inotify_init1(os.O_NONBLOCK)
for number in range(1500):
    path = '{name}/%d' % number
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    assert libc.inotify_add_watch(fd, path.encode(), {IN_ATTRIB}) == number + 1
rest()
""")
    found: list[tuple[int, bytes]] = []
    after, calls = 0, 0
    [fd] = [int(path.name) for path in Path(f'/proc/{program.pid}/fd').iterdir()
            if os.readlink(path) == 'anon_inode:inotify']  # noqa: PTH115
    with asked(attacker, program, tmp_path) as made:
        while calls == 0 or after:
            value, _ = made.answer(FindWatched(program.pid, fd, program.pid, after))
            found += cast(list[tuple[int, bytes]], value['paths'])
            after, calls = cast(int, value['more']), calls + 1
    assert calls > 2
    assert found == [(number + 1, os.fsencode(program.directory / name / str(number))) for number in range(1500)]


@pytest.fixture
def inotify() -> Iterator[Callable[[Path], int]]:
    """Make an instance that watches a file."""
    made: list[Inotify] = []

    def watch(path: Path) -> int:
        made.append(Inotify())
        made[-1].add(path, IN_ATTRIB)
        return made[-1].fd

    yield watch
    for one in made:
        one.close()
