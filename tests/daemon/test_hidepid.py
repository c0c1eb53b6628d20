# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a user is told where /proc hides the processes of others: as much as /proc tells, and no more.

No /proc of the machine is touched: a daemon, or a caller, has one of its own in a mount namespace. Each mount of proc
has its options for itself (since Linux 5.8).
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import places
from tests.daemon.test_callers import MANAGER, NOBODY, Busctl, sleeping
from tests.lib.bus import ROOT, PrivateBus, read_line, terminate
from tests.lib.systembus import in_own_mounts
from tests.programs.conftest import await_that

pytestmark = pytest.mark.needs('root', 'cgroup2', 'ptrace', 'dbus', 'unshare')

# every way to ask about a target: member, signature, what comes behind the target
WAYS = [('Scan', 'sa{sv}', ['0']), ('Check', 'sa{sv}', ['0']), ('Freeze', 'sa{sv}', ['0']),
        ('Checkpoint', 'sa{sv}', ['0']), ('Thaw', 'sa{sv}', ['0'])]
# a tree of nobody's, one process of which stays root's, or is not dumpable, as one is whose ids have changed
MIXED = """
import os, sys, time
def become():
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
ready, theirs = os.pipe()
child = os.fork()
if child == 0:
    if sys.argv[1] == 'undumpable':
        become()
    os.close(theirs)
    time.sleep(1000)
os.close(theirs)
os.read(ready, 1)
become()
print(child, flush=True)
os.execvp('sleep', ['sleep', '1000'])
"""


def with_proc(options: str, *command: str | Path) -> list[str | Path]:
    """A command line in a mount namespace with a /proc of its own."""
    return in_own_mounts(f'mount -t proc -o {options} proc /proc; exec "$@"', *command)


@contextlib.contextmanager
def daemon_with_proc(bus: PrivateBus, tmp_path: Path, options: str) -> Iterator[None]:
    command = with_proc(options, sys.executable, '-m', 'ckptd.daemon', '--address', bus.address, *places(tmp_path),
                        '--verbose')
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            while 'ready' not in (line := read_line(process.stderr.fileno(), 20)):
                assert line
            yield
        finally:
            terminate(process)


class Sandboxed(Busctl):
    """busctl as nobody, with a /proc of its own, as in a service with ProtectProc=."""

    def __init__(self, bus: PrivateBus, options: str) -> None:
        super().__init__(bus, NOBODY)
        self.bus, self.options = bus, options

    def call(self, interface: str, member: str, *arguments: str, path: str = '/org/ckptd1') -> Any:
        done = subprocess.run(with_proc(self.options, 'setpriv', f'--reuid={NOBODY}', f'--regid={NOBODY}',
                                        '--clear-groups', 'busctl', f'--address={self.bus.address}', '--json=short',
                                        'call', 'org.ckptd1', path, interface, member, *arguments),
                              capture_output=True, text=True, timeout=30, check=False, cwd='/')
        return json.loads(done.stdout)['data'] if done.returncode == 0 and done.stdout else done.stderr.strip()


def dead_pid() -> int:
    with subprocess.Popen(['true']) as process:
        process.wait()
    return process.pid


def about(asker: Busctl, pid: int) -> dict[str, str]:
    """What is said about a process in each way, its number made the same for all."""
    return {member: json.dumps(asker.call(MANAGER, member, signature, f'pid:{pid}', *more)).replace(str(pid), 'N')
            for member, signature, more in WAYS}


@pytest.fixture(params=['hidepid=1', 'hidepid=2', 'hidepid=4'])
def hiding(request: pytest.FixtureRequest, private_bus: PrivateBus, tmp_path: Path) -> Iterator[PrivateBus]:
    """A bus, and on it a daemon whose /proc hides."""
    with daemon_with_proc(private_bus, tmp_path, request.param):
        yield private_bus


def test_a_process_of_another_is_not_there(hiding: PrivateBus) -> None:
    nobody = Busctl(hiding, NOBODY)
    with sleeping(0) as process, sleeping(1) as another:
        assert about(nobody, process.pid) == about(nobody, another.pid) == about(nobody, dead_pid())
        assert 'sleep' not in str(about(nobody, process.pid))
        [[row]] = Busctl(hiding, 0).call(MANAGER, 'Scan', 'sa{sv}', f'pid:{process.pid}', '0')
        assert (row['comm']['data'], row['uid']['data']) == ('sleep', 0)


def test_a_zombie_and_a_thread_of_another_are_not_there(hiding: PrivateBus) -> None:
    nobody = Busctl(hiding, NOBODY)
    script = 'import threading, time; t = threading.Thread(target=time.sleep, args=(1000,), daemon=True); t.start(); ' \
             'print(t.native_id, flush=True); time.sleep(1000)'
    with subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE) as process, \
            subprocess.Popen(['sh', '-c', 'true & echo $!; exec sleep 1000'], stdout=subprocess.PIPE) as parent:
        assert process.stdout is not None
        assert parent.stdout is not None
        thread, zombie = int(process.stdout.readline()), int(parent.stdout.readline())
        assert about(nobody, thread) == about(nobody, zombie) == about(nobody, dead_pid())
        process.kill()
        parent.kill()


def test_ones_own_is_there(hiding: PrivateBus) -> None:
    nobody = Busctl(hiding, NOBODY)
    with sleeping(NOBODY) as process:
        target = f'pid:{process.pid}'
        [[row]] = nobody.call(MANAGER, 'Scan', 'sa{sv}', target, '0')
        assert (row['comm']['data'], row['uid']['data']) == ('sleep', NOBODY)
        assert nobody.call(MANAGER, 'Freeze', 'sa{sv}', target, '0') == [1]
        assert nobody.call(MANAGER, 'Thaw', 'sa{sv}', target, '0') is None


@contextlib.contextmanager
def mixed(kind: str) -> Iterator[tuple[int, int]]:
    """(root, child) of a tree of nobody's whose child is root's, or nobody's and not dumpable."""
    with subprocess.Popen([sys.executable, '-c', MIXED, kind], stdout=subprocess.PIPE,
                          start_new_session=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process.pid, child
        finally:
            subprocess.run(['kill', '-9', str(child)], check=True)
            process.kill()


@pytest.mark.parametrize(('kind', 'words'), [('of root', 'not all of which is theirs'),
                                              ('undumpable', 'does not see in /proc')])
def test_what_is_hidden_within_ones_own_tree(hiding: PrivateBus, kind: str, words: str) -> None:
    """It is not shown. That the tree cannot be checkpointed is told, and neither by what number or name, nor whose."""
    with mixed(kind) as (root, child):
        nobody, target = Busctl(hiding, NOBODY), f'pid:{root}'
        [rows] = nobody.call(MANAGER, 'Scan', 'sa{sv}', target, '0')
        assert [row['tid']['data'] for row in rows] == [root]
        [rows] = nobody.call(MANAGER, 'Check', 'sa{sv}', target, '0')
        [refusal] = [row for row in rows if row['resource']['data'] == 'ptrace']
        assert (refusal['pid']['data'], refusal['errno']['data']) == (0, 'EPERM')
        answer = nobody.call(MANAGER, 'Freeze', 'sa{sv}', target, '0')
        assert words in answer
        assert str(child) not in answer
        assert 'uid 0' not in answer
        [rows] = Busctl(hiding, 0).call(MANAGER, 'Scan', 'sa{sv}', target, '0')
        assert [row['tid']['data'] for row in rows] == [root, child]


def test_a_tracer_of_another_has_no_name(hiding: PrivateBus) -> None:
    script = 'import ctypes, sys; assert ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0; ' \
             'print(flush=True); sys.stdin.read()'
    with sleeping(NOBODY) as process, subprocess.Popen([sys.executable, '-c', script, str(process.pid)],
                                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == b'\n'
        said = {uid: [row['reason']['data'] for row in
                      Busctl(hiding, uid).call(MANAGER, 'Check', 'sa{sv}', f'pid:{process.pid}', *options)[0]
                      if row['resource']['data'] == 'ptrace']
                for uid, options in ((0, ('1', 'as_root', 'b', 'true')), (NOBODY, ('0',)))}
        assert f'[{tracer.pid}]' in str(said[0])
        assert said[NOBODY] == ['is traced by another process, and a task can have one tracer only']


def test_who_has_a_number_is_not_told(hiding: PrivateBus, tmp_path: Path) -> None:
    """Of an image whose tree runs: its numbers are taken, by whatever it is."""
    nobody = Busctl(hiding, NOBODY)
    with sleeping(NOBODY) as process:
        job = nobody.call(MANAGER, 'Checkpoint', 'sa{sv}', f'pid:{process.pid}', '1', 'detach', 'b', 'true')
        assert isinstance(job, list), job
        [image] = await_image(tmp_path / 'spool')
        said = {uid: [row['reason']['data'] for row in
                      Busctl(hiding, uid).call(MANAGER, 'CheckRestore', 'sa{sv}', image, '0')[0]
                      if row['resource']['data'] == f'pid {process.pid}'] for uid in (0, NOBODY)}
    assert said == {0: [f'the pid is in use by sleep[{process.pid}]'],
                    NOBODY: ['the pid is in use by another process']}


def await_image(spool: Path) -> list[str]:
    await_that('the image is there', lambda: bool(list(spool.glob('2*'))))
    return [path.name for path in spool.glob('2*')]


# ---------------------------------------------------------------- whose /proc, and who is exempt

@pytest.fixture
def daemon_on_bus(private_bus: PrivateBus, on_bus: object) -> PrivateBus:
    """A bus, and on it a daemon with the /proc of the machine."""
    return private_bus


def test_the_proc_of_the_caller_counts_too(daemon_on_bus: PrivateBus) -> None:
    open_, hidden = Busctl(daemon_on_bus, NOBODY), Sandboxed(daemon_on_bus, 'hidepid=2')
    with sleeping(0) as process:
        assert 'sleep' in about(open_, process.pid)['Scan']
        assert about(hidden, process.pid) == about(hidden, dead_pid())


@pytest.mark.parametrize(('options', 'sees'), [('hidepid=2,gid={}', True), ('hidepid=2,gid=8', False),
                                               ('hidepid=4,gid={}', False), ('hidepid=0', True)])
def test_a_group_is_exempt(private_bus: PrivateBus, tmp_path: Path, options: str, sees: bool) -> None:
    with daemon_with_proc(private_bus, tmp_path, options.format(NOBODY)), sleeping(0) as process:
        assert ('sleep' in about(Busctl(private_bus, NOBODY), process.pid)['Scan']) == sees
