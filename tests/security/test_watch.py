# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel is asked with root's rights while a user restores crafted images: what the broker's table says
(ckptd/protocol/broker_calls.py), on files of ckptd's own and in the user's cgroups, and nothing else.

strace(1) watches the broker, which is root from its first to its last system call. The worker cannot be watched so, as
it traces its stubs itself; tests/security/test_worker.py and test_reach.py look at its rights and theirs.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ckptd.errors import CkptError
from ckptd.image.ids import new_image_id
from ckptd.image.records import TaskRecord
from ckptd.protocol import broker_calls
from tests.fuzz.bases import FEW, UID, User, user_in
from tests.fuzz.looking import choose, dice_of
from tests.fuzz.restoring import LoggedWorker
from tests.lib import settled
from tests.lib.bus import ROOT
from tests.lib.gate import cgroup2_mount
from tests.lib.mutate import Change, Edit, Mutable

pytestmark = [pytest.mark.needs('strace', 'gcc', 'cgroup2'), pytest.mark.timeout(300)]

CRAFTED = 12
# calls that change nothing outside of the process; with a path they are held to READABLE
PASSIVE = frozenset((
    'read', 'pread64', 'preadv', 'readv', 'close', 'close_range', 'fstat', 'newfstatat', 'stat', 'lstat', 'statx',
    'statfs', 'fstatfs', 'lseek', 'getdents64', 'readlink', 'readlinkat', 'access', 'faccessat', 'faccessat2',
    'getcwd', 'ioctl', 'fcntl', 'dup', 'dup2', 'dup3', 'pipe2', 'poll', 'ppoll', 'select', 'pselect6',
    'epoll_create1', 'epoll_ctl', 'epoll_wait', 'epoll_pwait', 'socketpair', 'getsockname', 'getsockopt', 'sendmsg',
    'sendto', 'recvmsg', 'recvfrom', 'shutdown', 'wait4', 'waitid', 'signalfd4', 'rt_sigaction', 'rt_sigprocmask',
    'rt_sigreturn', 'getpid', 'getppid', 'gettid', 'getuid', 'geteuid', 'getgid', 'getegid', 'getgroups',
    'getresuid', 'getresgid', 'capget', 'getrandom', 'mmap', 'munmap', 'mprotect', 'mremap', 'madvise', 'brk',
    'futex', 'clock_gettime', 'clock_nanosleep', 'sched_yield', 'sched_getaffinity', 'getpriority', 'uname',
    'sysinfo', 'pidfd_open', 'restart_syscall', 'exit_group', 'getrlimit', 'memfd_create', 'fsync', 'flock',
    'set_robust_list', 'rseq', 'rt_sigtimedwait'))
# what is read: /proc, cgroups, ckptd's own files and its program. Nothing that an image names
READABLE = re.compile(r'(/proc|USERS|CGROUPS|SPOOL|RUNTIME|PYTHON)(/|$)')
JOURNAL = (r'mkdir RUNTIME(/freezes)?', r'open RUNTIME/freezes/\S+\.jsonl', r'write RUNTIME/freezes/\S+\.jsonl .*')
# the kernel decides by the rights of the user, taken for one look, whether a cgroup is theirs
AS_USER = (r'setgroups \[(USER)?\]', r'setfs[ug]id (USER|0)', r'capset .*')
IN_THE_CGROUP = (r'open USERS(/ckptd-\S+)?/cgroup\.(procs|freeze|kill)', r'write USERS(/ckptd-\S+)?/cgroup\.procs TREE',
                 r'write USERS/ckptd-\S+/cgroup\.(freeze|kill) [01]')
UNDONE = (*JOURNAL, *IN_THE_CGROUP, r'rmdir USERS/ckptd-\S+', r'unlink RUNTIME/freezes/\S+\.jsonl')
# by the call that the broker has been asked last, '' before the first: what it may do, as `doing` has it
TABLE: dict[str, tuple[str, ...]] = {
    '': (r'fork', r'(ptrace|kill) CHILD.*'),      # it asks a child for the size of xstate, then starts the worker
    'OpenImage': (),
    'PlaceTree': (*AS_USER, *JOURNAL, *IN_THE_CGROUP, r'mkdir USERS/ckptd-\S+'),
    'StartTree': UNDONE,
    'NoteStep': JOURNAL,
    'KeepContent': (*JOURNAL, r'open SPOOL/\.kept-\S+'),
    # after the last word of the worker, or its death
    'end': (*UNDONE, r'fork', r'kill CHILD.*'),
}
_LINE = re.compile(r'(\w+)\((.*)\)\s+= (-?\d+|\?)')
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_WRITING = re.compile(r'O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_TMPFILE')
# msgpack: a short text has its length in one byte
_MESSAGE = re.compile(r'type\\[0-7]{3}([A-Za-z]+)')
_WITH_PATH = frozenset((
    'newfstatat', 'stat', 'lstat', 'statx', 'statfs', 'readlink', 'readlinkat', 'access', 'faccessat', 'faccessat2'))
_BROKER_CALLS = {cls.__name__ for cls in vars(broker_calls).values()
                 if isinstance(cls, type) and issubclass(cls, broker_calls.Message) and cls is not broker_calls.Message}


@dataclass
class Watched:
    """The system calls of one broker, in plain words. children: what it has forked. asked: the row of TABLE."""
    user: User
    image: Mutable
    children: set[str] = field(default_factory=set)
    asked: str = ''

    def breaches(self, lines: list[str]) -> Iterator[str]:
        """What the table does not have."""
        for line in lines:
            found = _LINE.match(line)
            if found is None:
                continue
            name, arguments, result = found.groups()
            if name in ('recvfrom', 'recvmsg'):
                self._hear(arguments, result)
            what = self._doing(name, arguments, result)
            if what and not any(re.fullmatch(pattern, what) for pattern in TABLE[self.asked]):
                yield f'{self.asked or "at first"}: {what}: {line[:300]}'

    def _hear(self, arguments: str, result: str) -> None:
        message = _MESSAGE.search(arguments)
        if message and message[1] in _BROKER_CALLS:
            self.asked = message[1]
        elif self.asked and (result == '0' or (message and message[1] in ('Failed', 'Finished'))):
            self.asked = 'end'

    def _doing(self, name: str, arguments: str, result: str) -> str:
        """What TABLE is about; '' of what changes nothing."""
        if name in ('openat', 'open') and not _WRITING.search(arguments):
            return self._reading(arguments)
        if name in _WITH_PATH:
            return self._reading(arguments)
        if name in PASSIVE:
            return ''
        match name:
            case 'clone' | 'fork' | 'vfork' | 'clone3':
                self.children.add(result)
                return 'fork'
            case 'kill' | 'ptrace' | 'tgkill':
                pid = next(iter(re.findall(r'\b\d+\b', arguments)), '')
                return f'{name} CHILD' if pid in self.children else f'{name} {arguments}'
            case 'openat' | 'open':
                return f'open {self._path(arguments)}'
            case 'write' | 'pwrite64':
                path, text = re.match(r'\d+<([^>]*)>, "(.*?)"', arguments).groups()  # type: ignore[union-attr]
                return f'write {self._named(path)} {self._pid(text) if path.endswith("cgroup.procs") else text}'
            case 'mkdir' | 'rmdir' | 'unlink' | 'mkdirat' | 'unlinkat':
                return f'{name.removesuffix("at")} {self._path(arguments)}'
            case 'setfsuid' | 'setfsgid' | 'setgroups':
                what = re.sub(rf'\b{UID}\b', 'USER', arguments.split(', ', 1)[-1])
                return f'{name} {what}'
        return f'{name} {arguments}'

    def _reading(self, arguments: str) -> str:
        path = self._path(arguments)
        return '' if READABLE.match(path) else f'read {path}'

    def _path(self, arguments: str) -> str:
        found = _PATH.search(arguments)
        assert found, arguments
        return self._named(os.path.normpath(os.path.join(found[1] or '/', found[2])))  # noqa: PTH118

    def _named(self, path: str) -> str:
        place, mount = self.user.place, str(cgroup2_mount())
        names = {str(self.user.cgroup): 'USERS', str(place.spool): 'SPOOL', str(place.runtime): 'RUNTIME',
                 mount: 'CGROUPS'}
        code = {str(ROOT), sys.prefix, sys.base_prefix, '/usr/lib', '/lib', '/usr/lib64', '/etc/ld.so.cache'}
        for directory, name in (names | dict.fromkeys(sorted(code, reverse=True), 'PYTHON')).items():
            if path == directory or path.startswith(f'{directory}/'):
                return name + path[len(directory):]
        return path

    def _pid(self, text: str) -> str:
        """Of the tree: a vpid of the image, which is its pid."""
        return 'TREE' if text.isdecimal() and int(text) in self.image.vpids else text


@contextmanager
def straced(pid: int, output: Path) -> Iterator[None]:
    """Watch a process, and none of its children, until it has ended."""
    with subprocess.Popen(['strace', '-y', '-qq', '-s', '80', '-o', output, '-p', str(pid)]) as tracer:
        while f'TracerPid:\t{tracer.pid}\n' not in Path(f'/proc/{pid}/status').read_text():
            assert tracer.poll() is None, 'strace does not trace'
            os.sched_yield()
        yield
        assert tracer.wait(20) == 0


def watched(user: User, image: Mutable, edits: list[Edit], output: Path) -> list[str]:
    """Restore an image under the watch; what the broker did that it may not."""
    written = image.write(user.place.spool / new_image_id('watch'), edits)
    request = user.place.request(0, operation='restore', caller=user.caller, image=written.name)
    with LoggedWorker() as worker, straced(worker.pid, output), suppress(CkptError):
        worker.run(request)
    assert worker.log == []
    user.end_all()
    assert user.place.freezes == []
    return list(Watched(user, image).breaches(output.read_text(errors='replace').splitlines()))


@pytest.fixture(scope='module')
def user() -> Iterator[User]:
    settled.become_subreaper()
    with user_in() as made:
        yield made


@pytest.fixture(scope='module')
def images(user: User) -> Iterator[list[Mutable]]:
    with user.images(FEW) as found:
        yield found


def test_restores(user: User, images: list[Mutable], tmp_path: Path) -> None:
    for image in images:
        assert watched(user, image, [], tmp_path / 'trace') == []


def test_cgroups_that_an_image_names(user: User, images: list[Mutable], tmp_path: Path) -> None:
    """Whatever they are: the broker works in those of the user."""
    image = images[0]
    for name in ('', '/', '/..', '/../..', '/init.scope', '/system.slice', f'/user.slice/user-{UID}.slice/../..'):
        edits: list[Edit] = [Change('TREE', index, (replace(task, cgroup=name),), name)
                             for index, task in enumerate(image.part('TREE')) if isinstance(task, TaskRecord)]
        assert watched(user, image, edits, tmp_path / 'trace') == []


def test_crafted_images(user: User, images: list[Mutable], tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    for number in range(CRAFTED):
        image, edits = choose(images, dice_of(seed, number))
        assert watched(user, image, edits, tmp_path / 'trace') == [], (seed, [*map(str, edits)])


def test_the_table_is_the_brokers() -> None:
    """Each call of calls.py that a restore makes has a row here; the others belong to other jobs."""
    others = {'NewImage', 'Publish', 'FreezeTree', 'LetRun', 'HoldTree', 'RestoreTree', 'StopUnit', 'EndTree',
              'ReadTimers', 'FindWatched', 'NoteWalk', 'EndWalk', 'NoteTaken', 'EndTaken'}
    assert others.isdisjoint(TABLE)
    assert {call.__name__ for call in broker_calls.BrokerCall.__args__} == {*TABLE, *others} - {'', 'end'}


def test_the_watch_sees_what_is_not_in_the_table(user: User, images: list[Mutable]) -> None:
    seen = Watched(user, images[0], asked='PlaceTree')
    for line in ('fchown(3</etc/passwd>, 0, 0) = 0', 'openat(AT_FDCWD</>, "/etc/shadow", O_RDONLY) = 3',
                 'kill(1, SIGKILL) = 0', 'openat(AT_FDCWD</>, "/root/x", O_WRONLY|O_CREAT, 0600) = 3',
                 f'write(4<{user.cgroup}/cgroup.procs>, "1", 1) = 1', 'setresuid(0, 0, 0) = 0', 'mount(NULL, "/") = 0'):
        assert len(list(seen.breaches([line]))) == 1, line
