# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees in odd states, each once the end of a checkpoint or of its tree."""

import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.dump.vmas import map_flags
from ckptd.errors import Cancelled, CkptError, FreezeTimeout, NotSupported, Refused, TreeChanged
from ckptd.image.reader import ImageReader
from ckptd.image.records import (
    Backing,
    Credentials,
    Extent,
    Limits,
    Mm,
    ProcessState,
    SavedFile,
    Scheduling,
    TaskRecord,
)
from ckptd.kernel.maps import parse_maps
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_children, read_threads
from ckptd.objects.mappings.registry import MappingKinds
from ckptd.protocol.messages import Cancel
from tests.lib.gate import own_cgroup
from tests.lib.procdiff import take_picture
from tests.worker.driver import DirectWorker, Place
from tests.worker.faulty import asking
from tests.worker.test_victims import changes

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

HEAD = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static void ready(void) { if (write(1, "r", 1) != 1) _exit(99); close(1); }
"""
START = Callable[[str], 'subprocess.Popen[bytes]']


@pytest.fixture
def start(tmp_path: Path) -> Iterator[START]:
    """start(code): a C program, running since it called ready()."""
    running: list[subprocess.Popen[bytes]] = []

    def run(code: str) -> 'subprocess.Popen[bytes]':
        source = tmp_path / 'program.c'
        source.write_text(HEAD + code)
        subprocess.run(['gcc', '-O1', '-pthread', '-o', tmp_path / 'program', source], check=True)
        process = subprocess.Popen([tmp_path / 'program'], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.read() == b'r'
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / 'place').make()


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path) -> None:
    (tmp_path / 'place').mkdir()


PENDING = r"""
int main(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGURG), sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, 0);
    sigqueue(getpid(), SIGURG, (union sigval){.sival_int = 4242});
    ready();
    siginfo_t info;
    sigdelset(&set, SIGURG);
    while (sigwaitinfo(&set, &info) != SIGUSR1);
    sigaddset(&set, SIGURG);
    int got = sigtimedwait(&set, &info, &(struct timespec){0});
    return !(got == SIGURG && info.si_code == SI_QUEUE && info.si_value.sival_int == 4242);
}
"""


@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
def test_a_pending_signal_is_not_taken_for_the_trap(start: START, place: Place, freeze: str) -> None:
    process = start(PENDING)
    with ImageReader(place.checkpoint(process.pid, freeze=freeze)) as reader:
        (info,) = reader.get(ProcessState, process.pid).shared_pending
        assert int.from_bytes(info[:4], 'little') == signal.SIGURG
        assert int.from_bytes(info[24:28], 'little') == 4242
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0


SEGMENT = r"""
#include <sched.h>
#include <sys/shm.h>
int main(int argc, char **argv)
{
    if (argc) unshare(CLONE_NEWIPC);                    /* where the first segment has number 0 */
    char *at = shmat(shmget(IPC_PRIVATE, 8192, 0600), 0, 0);
    at[4096] = 'x';
    ready();
    pause();
}
"""


def test_a_segment_of_another_ipc_namespace_is_refused(start: START, place: Place) -> None:
    process = start(SEGMENT)
    with pytest.raises(Refused, match='another IPC namespace'):
        place.checkpoint(process.pid)


def test_the_first_segment_is_no_private_memory() -> None:
    line = b'7f00-8f00 rw-s 00000000 00:01 0                          /SYSV00000000 (deleted)\n'
    (segment,) = parse_maps(line)
    (nothing,) = parse_maps(b'7f00-8f00 rw-p 00000000 00:00 0 \n')
    assert not segment.anonymous
    assert map_flags(MappingKinds().of(segment), segment) == 1
    assert nothing.anonymous


BIG = r"""
#include <sys/mman.h>
int main(void)
{
    size_t size = 600L << 20;
    pid_t child = fork();
    if (!child) {
        char *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(at, 7, size);
        ready();
    }
    close(1);
    for (;;) pause();
}
"""


@pytest.mark.parametrize('point', ['state-read', 'memory-half'])
def test_a_member_that_dies_slowly_leaves_no_cgroup(start: START, place: Place, point: str) -> None:
    """To give back memory takes a while, and in the meantime a task cannot be moved to another cgroup."""
    process = start(BIG)
    (child,) = read_children(process.pid, process.pid)
    home = own_cgroup()
    assert home is not None
    env = {'CKPTD_FAULT': f'{point}=ask', 'CKPTD_FAULT_FILE': str(place.path / 'ask')}
    with DirectWorker(env=env) as worker, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
        asked.bind(env['CKPTD_FAULT_FILE'])
        asked.listen()
        killer = threading.Thread(target=_kill_when_asked, args=(asked, child))
        killer.start()
        with pytest.raises(TreeChanged, match='died'):
            worker.run(place.request(process.pid))
        killer.join()
    assert list(home.rglob('ckptd-1-*')) == []
    assert not place.freezes
    assert read_status(process.pid).tracer_pid == 0


def _kill_when_asked(asked: socket.socket, pid: int) -> None:
    connection, _ = asked.accept()
    with connection:
        connection.recv(64)
        os.kill(pid, signal.SIGKILL)
        connection.send(b'')


RESTLESS = r"""
#include <sys/wait.h>
static void *nothing(void *unused) { return unused; }
int main(void)
{
    ready();
    for (;;) {
        pid_t child = fork();
        if (!child) _exit(0);
        waitpid(child, 0, 0);
        pthread_t one;
        pthread_create(&one, 0, nothing, 0);
        pthread_join(one, 0);
    }
}
"""


@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
def test_children_that_come_and_go_are_no_reason(start: START, place: Place, freeze: str) -> None:
    process = start(RESTLESS)
    for _ in range(5):
        place.checkpoint(process.pid, freeze=freeze)
    assert read_status(process.pid).tracer_pid == 0


SPARSE = r"""
#include <fcntl.h>
#include <sys/mman.h>
int main(void)
{
    off_t size = 1L << 30;
    int fd = open("/dev/shm/ckptd-sparse", O_RDWR | O_CREAT | O_EXCL, 0600);
    unlink("/dev/shm/ckptd-sparse");
    if (ftruncate(fd, size + 5)) return 1;
    char *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    at[12345] = 'a', at[size - 1] = 'z';
    ready();
    pause();
}
"""


def test_a_deleted_file_with_holes_takes_little_room(start: START, place: Place) -> None:
    image = place.checkpoint(start(SPARSE).pid)
    assert sum(file.stat().st_blocks for file in image.iterdir()) * 512 < 32 << 20
    with ImageReader(image) as reader:
        (backing,) = (one for one in reader.every(Backing) if 'ckptd-sparse' in one.path)
        (extent,) = backing.content
        assert extent.length == backing.size == (1 << 30) + 5
        for at, byte in ((12345, b'a'), ((1 << 30) - 1, b'z'), (99999, b'\0')):
            assert b''.join(reader.read_extent(Extent(extent.part, extent.offset + at, 1))) == byte


LEADERLESS = r"""
static void *thread(void *unused)
{
    ready();
    for (;;) pause();
}
int main(void)
{
    pthread_t one;
    pthread_create(&one, 0, thread, 0);
    syscall(SYS_exit, 0);
}
"""


@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
def test_a_process_whose_leader_has_exited(start: START, place: Place, freeze: str) -> None:
    process = start(LEADERLESS)
    while read_status(process.pid).state != 'Z':
        os.sched_yield()
    (thread,) = set(read_threads(process.pid)) - {process.pid}
    before = take_picture(process.pid, moving=True)
    image = place.checkpoint(process.pid, freeze=freeze)
    assert changes(before, take_picture(process.pid, moving=True)) == []
    assert read_status(thread).state == 'S'
    with ImageReader(image) as reader:
        assert [(task.vpid, chr(task.record.state)) for task in reader.tasks] == [(process.pid, 'Z'), (thread, 'S')]
        assert len(reader.get(Limits, process.pid).limits) == 16
        assert reader.tasks[1].record.mm_id


@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
def test_a_process_whose_leader_has_exited_is_killed(start: START, place: Place, freeze: str) -> None:
    process = start(LEADERLESS)
    place.checkpoint(process.pid, freeze=freeze, after='kill')
    assert process.wait(10) == -signal.SIGKILL


def test_the_longest_timer_slack(start: START, place: Place) -> None:
    process = start('int main(void) { prctl(PR_SET_TIMERSLACK, -1UL); ready(); pause(); }')
    with ImageReader(place.checkpoint(process.pid)) as reader:
        assert reader.get(Scheduling, process.pid).timer_slack == 2**64 - 1


def test_a_process_at_its_limit_of_memory_says_so(start: START, place: Place) -> None:
    process = start('int main(void) { ready(); pause(); }')
    resource.prlimit(process.pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    with pytest.raises(CkptError, match='gets no memory for remote calls') as caught:
        place.checkpoint(process.pid)
    assert 'prlimit' in caught.value.hint
    assert read_status(process.pid).tracer_pid == 0


DISPATCHED = r"""
static volatile char block;
static volatile sig_atomic_t hits;
static void on_sigsys(int signal) { block = 0, hits++; }
int main(void)
{
    signal(SIGSYS, on_sigsys);
    prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &block);
    sigset_t set;
    int got;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, 0);
    ready();
    sigwait(&set, &got);
    block = 1;
    getppid();
    return hits != 1;
}
"""


def test_a_program_under_syscall_user_dispatch_is_refused(start: START, place: Place) -> None:
    """It was killed: its handler for SIGSYS was lost."""
    process = start(DISPATCHED)
    with pytest.raises(NotSupported, match='Syscall User Dispatch'):
        place.checkpoint(process.pid)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0
    assert not any(place.spool.iterdir())


def test_names_that_are_no_text(start: START, place: Place) -> None:
    process = start(r'int main(void) { prctl(PR_SET_NAME, "a\n)\xff ("); ready(); pause(); }')
    with ImageReader(place.checkpoint(process.pid)) as reader:
        assert os.fsencode(reader.tasks[0].record.comm) == b'a\n)\xff ('
    process.kill()      # before others look at the names of all processes
    process.wait()


LOCKED_WITH_ZOMBIE = r"""
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
int main(void)
{
    struct f_owner_ex owner = {F_OWNER_PID, 0};
    siginfo_t info;
    pid_t pid;

    if (mlockall(MCL_FUTURE | MCL_ONFAULT) != 0)
        return 1;
    owner.pid = getpid();
    fcntl(0, F_SETOWN_EX, &owner);
    pid = fork();
    if (pid == 0)
        _exit(setresuid(1234, 1235, 1236) == 0 ? 3 : 1);
    waitid(P_PID, pid, &info, WEXITED | WNOWAIT);
    ready();
    pause();
}
"""


def test_locks_to_come_and_what_is_left_of_the_dead(start: START, place: Place) -> None:
    process = start(LOCKED_WITH_ZOMBIE)
    zombie, = read_children(process.pid, process.pid)
    with ImageReader(place.checkpoint(process.pid)) as reader:
        assert [mm.lock_future for mm in reader.every(Mm)] == [2]
        assert reader.get(Credentials, zombie).uids[:3] == (1234, 1235, 1236)
        assert reader.get(TaskRecord, zombie).exit_code == 3 << 8
        owned = next(file for file in reader.every(SavedFile) if file.owner)
        assert (owned.owner, owned.owner_uid, owned.owner_euid) == (process.pid, os.getuid(), os.geteuid())


WITH_THREADS = r"""
static void *thread(void *unused)
{
    for (;;) pause();
}
int main(void)
{
    pthread_t one;
    if (fork())
        close(1);
    else {
        pthread_create(&one, 0, thread, 0);
        pthread_create(&one, 0, thread, 0);
        ready();
    }
    for (;;) pause();
}
"""


def until_dead(pid: int) -> None:
    while read_status(pid).state != 'Z':
        os.sched_yield()


# the root's three remote calls, then those of the child: one maps memory, each of three threads is asked, one unmaps
@pytest.mark.parametrize('nth', range(1, 9))
@pytest.mark.timeout(30)
def test_a_process_with_threads_that_is_killed_in_a_remote_call(start: START, place: Place, nth: int) -> None:
    """Its leader is a zombie that its tracer cannot reap before the threads: the worker waited for ever."""
    process = start(WITH_THREADS)
    (child,) = read_children(process.pid, process.pid)

    def kill() -> None:
        os.kill(child, signal.SIGKILL)
        until_dead(child)

    with (asking(place.path / 'ask', 'running-remote', nth, kill) as env, DirectWorker(env=env) as worker,
          pytest.raises(TreeChanged, match='died')):
        worker.run(place.request(process.pid))
    assert read_threads(child) == [child]
    status = read_status(process.pid)
    assert (status.state, status.tracer_pid) == ('S', 0)
    assert not any(place.spool.iterdir())


@pytest.mark.parametrize('nth', [1, 2, 3])
@pytest.mark.timeout(30)
def test_a_task_that_does_not_end_its_remote_call(start: START, place: Place, cgroup: Path, nth: int) -> None:
    """Its cgroup is frozen meanwhile, as systemd does when the machine goes to sleep: the worker waited for ever. The
    task undoes by itself what it has begun, as soon as it can."""
    process = start('int main(void) { ready(); pause(); }')
    (cgroup / 'cgroup.procs').write_text(str(process.pid))
    before = take_picture(process.pid)

    def freeze() -> None:
        (cgroup / 'cgroup.freeze').write_text('1')
        if error is Cancelled:
            worker.send(Cancel())

    errors: dict[type[CkptError], int] = {FreezeTimeout: 1, Cancelled: 50}
    for error, timeout in errors.items():
        with (asking(place.path / 'ask', 'running-remote', nth, freeze) as env,
              DirectWorker(env=env) as worker):
            began = time.monotonic()
            with pytest.raises(error):
                worker.run(place.request(process.pid, freeze='ptrace', timeout_usec=timeout * 10**6))
            assert time.monotonic() - began < 10
        (cgroup / 'cgroup.freeze').write_text('0')
        while read_status(process.pid).state != 'S':
            assert process.poll() is None
            os.sched_yield()
        assert changes(before, take_picture(process.pid)) == []
    place.checkpoint(process.pid)
