# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refusals and warnings, each provoked by a real task."""

import ctypes
import dataclasses
import fcntl
import mmap
import os
import select
import signal
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ckptd.errors import Finding, Refused
from ckptd.inspect import checks
from ckptd.inspect.checks import check_tree
from ckptd.inspect.checks.tasks import check_kthread
from ckptd.inspect.scan import scan_tree
from ckptd.kernel.maps import parse_maps, parse_smaps, read_smaps
from ckptd.kernel.seccomp import may_suspend
from ckptd.kernel.stat import PF_KTHREAD, PF_USER_WORKER, read_stat
from ckptd.kernel.status import read_status
from ckptd.objects.attributes import seccomp
from ckptd.objects.mappings.registry import MappingKinds
from ckptd.protocol.requests import Caller
from ckptd.tree import Tree
from tests.lib.brood import Brood, become, fork, libc
from tests.lib.ways import let_others_through

ROOT = Caller(uid=0, gid=0)
NOBODY = 65534
OTHER = 65533
CLONE_NEWUTS = 0x04000000
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
PTRACE_SEIZE = 0x4206
needs_root = pytest.mark.needs('root')


def check(pid: int, caller: Caller | None = None, **options: Any) -> list[Finding]:
    """What is found of the tree at pid, by default for the test's own user."""
    own = caller or Caller(os.getuid(), os.getgid(), tuple(os.getgroups()), os.getpid())
    return check_tree(scan_tree([pid]), own, **options)


def refusals(rows: Iterable[Finding], *, but: str = 'fd ') -> list[tuple[int, str, str]]:
    """(pid, resource, errno) of the refusals; the files that a child has from the test process are not its own."""
    return [(row.pid, row.resource, row.errno) for row in rows
            if row.severity == 'refusal' and not row.resource.startswith(but)]


def fd_rows(rows: Iterable[Finding], fd: int) -> list[tuple[str, str, str]]:
    return [(row.severity, row.errno, row.reason) for row in rows if row.resource == f'fd {fd}']


def test_plain_tree_has_none(brood: Brood) -> None:
    root, _ = brood.ask(lambda: brood.fork())
    assert refusals(check(root)) == []


# ---------------------------------------------------------------- access

@needs_root
def test_stranger_may_not_look(brood: Brood) -> None:
    root, child = brood.ask(lambda: brood.fork())
    rows = check(root, Caller(NOBODY, NOBODY))
    assert [(row.pid, row.resource) for row in rows] == [(root, 'ptrace'), (child, 'ptrace')]
    assert {row.errno for row in rows} == {'EPERM'}
    assert Refused.because(rows).exit_status == 4


@needs_root
def test_owner_may_look_and_is_told_of_the_others(brood: Brood) -> None:
    def root() -> int:
        child = brood.fork()
        become(NOBODY)
        return child
    owned, others = brood.ask(root)
    rows = check(owned, Caller(NOBODY, NOBODY))
    assert refusals(rows) == [(others, 'ptrace', 'EPERM')]
    # nothing but that is told of a task that the caller may not look at
    assert [row.resource for row in rows if row.pid == others] == ['ptrace']


@needs_root
def test_undumpable_task_is_not_its_owners(brood: Brood) -> None:
    pid = brood.fork(lambda: (become(NOBODY), libc.prctl(4, 0, 0, 0, 0))[1])
    assert refusals(check(pid, Caller(NOBODY, NOBODY))) == [(pid, 'ptrace', 'EPERM')]
    assert refusals(check(pid)) == []


@needs_root
def test_capability_of_the_caller_counts(brood: Brood) -> None:
    pid = brood.fork(lambda: become(OTHER))
    cap_sys_ptrace = 1 << 19
    assert refusals(check(pid, Caller(NOBODY, NOBODY, (), os.getpid(), cap_sys_ptrace))) == []
    assert refusals(check(pid, Caller(NOBODY, NOBODY, (), os.getpid(), 0))) == [(pid, 'ptrace', 'EPERM')]
    # of a caller that is gone nobody knows whose namespace its capabilities are of
    assert refusals(check(pid, Caller(NOBODY, NOBODY, (), 0, cap_sys_ptrace))) == [(pid, 'ptrace', 'EPERM')]


@needs_root
def test_capability_in_another_user_namespace_does_not_count(brood: Brood) -> None:
    caller = brood.fork(lambda: (become(NOBODY), libc.unshare(0x10000000))[1])
    pid = brood.fork(lambda: become(OTHER))
    assert int(read_status(caller).cap_eff) != 0
    rows = check(pid, Caller(NOBODY, NOBODY, (), caller, read_status(caller).cap_eff))
    assert refusals(rows) == [(pid, 'ptrace', 'EPERM')]


@needs_root
def test_capability_of_a_caller_whose_number_is_anothers_does_not_count(brood: Brood) -> None:
    caller, pid = brood.fork(), brood.fork(lambda: become(OTHER))
    cap_sys_ptrace, began = 1 << 19, read_stat(caller).start_time
    for start_time, answer in ((began, []), (0, []), (began + 1, [(pid, 'ptrace', 'EPERM')])):
        asks = Caller(NOBODY, NOBODY, (), caller, cap_sys_ptrace, start_time=start_time)
        assert refusals(check(pid, asks)) == answer


def as_user(brood: Brood, uid: int, work: Callable[[], list[Finding]]) -> list[Finding]:
    """What check finds when ckptd itself runs as an ordinary user."""
    def run() -> list[dict[str, Any]]:
        become(uid)
        return [dataclasses.asdict(row) for row in work()]
    return [Finding(**row) for row in brood.ask(run)[1]]


@needs_root
def test_ordinary_users_ckptd_checks_that_users_tree(brood: Brood) -> None:
    def own() -> list[Finding]:
        root, _ = brood.ask(lambda: brood.fork())
        return check(root, Caller(NOBODY, NOBODY))
    assert refusals(as_user(brood, NOBODY, own)) == []


@needs_root
def test_ordinary_users_ckptd_refuses_what_it_may_not_read(brood: Brood) -> None:
    pid = brood.fork()
    rows = as_user(brood, NOBODY, lambda: check(pid, Caller(NOBODY, NOBODY)))
    assert refusals(rows) == [(pid, 'ptrace', 'EPERM')]


@needs_root
def test_ordinary_users_ckptd_cannot_act_for_others(brood: Brood) -> None:
    pid = brood.fork(lambda: become(OTHER))
    rows = as_user(brood, NOBODY, lambda: check(pid, Caller(OTHER, OTHER)))
    assert [(row.pid, row.resource, row.errno) for row in rows] == [(0, 'credentials', 'EPERM')]


@needs_root
def test_deleted_mapped_file_needs_root(brood: Brood, tmp_path: Path) -> None:
    def own() -> list[Finding]:
        with (tmp_path / 'gone').open('r+b') as file:
            mapping = mmap.mmap(file.fileno(), 4096)
        (tmp_path / 'gone').unlink()
        rows = check(brood.fork(), Caller(NOBODY, NOBODY))
        mapping.close()
        return rows
    (tmp_path / 'gone').write_bytes(bytes(4096))
    for path in (tmp_path, tmp_path / 'gone'):
        os.chown(path, NOBODY, NOBODY)
    let_others_through(tmp_path)
    rows = [row for row in as_user(brood, NOBODY, own) if '/gone' in row.reason]
    assert [(row.errno, row.severity) for row in rows] == [('EPERM', 'refusal')]


# ---------------------------------------------------------------- tasks

def test_dead_task_is_eagain(brood: Brood) -> None:
    root = brood.fork()
    alive = scan_tree([root]).root
    pid = os.posix_spawn('/bin/true', ['true'], {})
    os.waitpid(pid, 0)
    tree = Tree((alive, dataclasses.replace(alive, tid=pid, tgid=pid)))
    rows = check_tree(tree, Caller(os.getuid(), os.getgid()))
    assert refusals(rows) == [(pid, 'task', 'EAGAIN')]
    assert Refused.because(row for row in rows if row.severity == 'refusal').exit_status == 75


def test_zombie_is_no_refusal(brood: Brood) -> None:
    def root() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(3)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert refusals(check(brood.fork(root))) == []


@needs_root
def test_other_namespace(brood: Brood) -> None:
    root, child = brood.ask(lambda: brood.fork(lambda: libc.unshare(CLONE_NEWUTS)))
    assert refusals(check(root)) == [(child, 'namespace uts', 'EPERM')]
    assert refusals(check(child)) == []


@needs_root
def test_namespace_of_future_children(brood: Brood) -> None:
    pid = brood.fork(lambda: libc.unshare(0x20000000))
    assert refusals(check(pid)) == [(pid, 'namespace pid_for_children', 'EPERM')]


def test_traced_by_somebody_else(brood: Brood) -> None:
    def root() -> int:
        child = brood.fork()
        assert libc.ptrace(PTRACE_SEIZE, child, 0, 0) == 0
        return child
    tracer, tracee = brood.ask(root)
    rows = check(tracer)
    assert refusals(rows) == [(tracee, 'ptrace', 'EBUSY')]
    assert any(f'[{tracer}]' in row.reason for row in rows)


def test_traced_by_us_is_fine(brood: Brood) -> None:
    pid = brood.fork()
    assert libc.ptrace(PTRACE_SEIZE, pid, 0, 0) == 0
    assert refusals(check(pid)) == []


def allow_everything() -> None:
    """A seccomp filter of one instruction: return SECCOMP_RET_ALLOW."""
    code = ctypes.create_string_buffer(struct.pack('=HBBI', 0x06, 0, 0, 0x7fff0000))
    program = ctypes.create_string_buffer(struct.pack('=HxxxxxxQ', 1, ctypes.addressof(code)))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0


def test_seccomp(brood: Brood) -> None:
    pid = brood.fork(allow_everything)
    assert refusals(check(pid)) == ([] if may_suspend() else [(pid, 'seccomp', 'EACCES')])


def test_seccomp_that_may_not_be_read(brood: Brood, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a filter of our own; see tests/worker/test_seccomp.py for a real one."""
    monkeypatch.setattr(seccomp, 'may_suspend', lambda: False)
    pid = brood.fork(allow_everything)
    assert refusals(check(pid)) == [(pid, 'seccomp', 'EACCES')]
    task = scan_tree([pid]).root
    [row] = seccomp.Seccomp().findings(task, read_status(pid)._replace(seccomp=1))
    assert 'strict mode' in row.reason


def test_kernel_thread(brood: Brood) -> None:
    task = scan_tree([brood.fork()]).root
    assert 'kernel thread' in check_kthread(dataclasses.replace(task, flags=PF_KTHREAD))[0].reason
    assert 'vhost' in check_kthread(dataclasses.replace(task, flags=PF_USER_WORKER))[0].reason


def test_vfork_wait(brood: Brood, tmp_path: Path) -> None:
    """posix_spawn(3) suspends its caller until the child has called execve; a FIFO keeps it from that."""
    fifo = str(tmp_path / 'fifo')
    os.mkfifo(fifo)

    pid = fork()
    if pid == 0:
        os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, fifo, os.O_RDONLY, 0)])
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    try:
        while not any(task.depth for task in scan_tree([pid])) or scan_tree([pid]).root.state != 'D':
            os.sched_yield()
        assert (pid, 'task', 'EAGAIN') in refusals(check(pid))
    finally:
        os.close(os.open(fifo, os.O_WRONLY))
        assert os.waitpid(pid, 0)[1] == 0


def elf32() -> bytes:
    """A static i386 program: mov eax, 29 (pause); int 0x80; jmp back."""
    code = b'\xb8\x1d\x00\x00\x00\xcd\x80\xeb\xf7'
    base, size = 0x08048000, 52 + 32 + len(code)
    header = struct.pack('<16sHHIIIIIHHHHHH', b'\x7fELF\x01\x01\x01', 2, 3, 1, base + 84, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    return header + struct.pack('<IIIIIIII', 1, 0, base, base, size, size, 5, 4096) + code


def test_32_bit_program(tmp_path: Path) -> None:
    program = tmp_path / 'i386'
    program.write_bytes(elf32())
    program.chmod(0o755)
    try:
        pid = os.posix_spawn(program, ['i386'], {})
    except OSError as error:
        pytest.skip(f'this kernel runs no 32-bit programs: {error}')
    try:
        assert refusals(check(pid)) == [(pid, 'exe', 'EOPNOTSUPP')]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_deleted_directory_is_a_warning(brood: Brood, tmp_path: Path) -> None:
    def leave() -> None:
        os.chdir(tmp_path / 'gone')
        (tmp_path / 'gone').rmdir()
    (tmp_path / 'gone').mkdir()
    rows = [row for row in check(brood.fork(leave)) if row.resource == 'cwd']
    assert [(row.severity, row.errno) for row in rows] == [('warning', 'ENOENT')]


def test_ckptd_itself_in_the_tree(brood: Brood) -> None:
    root, child = brood.ask(lambda: brood.fork())
    assert refusals(check(root, avoid=[child, os.getpid()])) == [(child, 'task', 'EDEADLK')]


def test_a_tree_with_ckptd_in_it_is_not_read(brood: Brood, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of PID 1 is the whole machine: its refusal took seconds."""
    def read(*_: object) -> NoReturn:
        raise AssertionError('it was read')

    for name in ('check_tasks', 'check_vmas', 'check_files'):
        monkeypatch.setattr(checks, name, read)
    root, child = brood.ask(lambda: brood.fork())
    assert refusals(check(root, avoid=[child])) == [(child, 'task', 'EDEADLK')]
    with pytest.raises(AssertionError, match='it was read'):
        check(root)


def test_check_of_a_tree_that_changes_all_the_time(brood: Brood) -> None:
    def change_for_ever() -> int:
        pid = fork()
        while pid == 0:
            ends = os.pipe()
            child = fork()
            if child == 0:
                os._exit(0)
            for end in ends:
                os.close(end)
            os.waitpid(child, 0)
        return pid
    root, restless = brood.ask(change_for_ever)
    try:
        for _ in range(30):
            assert {errno for _, _, errno in refusals(check(root))} <= {'EAGAIN'}
    finally:
        os.kill(restless, signal.SIGKILL)


# ---------------------------------------------------------------- frozen

def test_not_frozen_is_ebusy_unless_self(brood: Brood, cgroup: Path) -> None:
    root, child = brood.ask(lambda: brood.fork())
    for pid in (root, child):
        (cgroup / 'cgroup.procs').write_text(str(pid))
    assert refusals(check(root, frozen_required=True)) == [(root, 'cgroup', 'EBUSY'), (child, 'cgroup', 'EBUSY')]
    itself = Caller(os.getuid(), os.getgid(), (), root)
    assert refusals(check(root, itself, frozen_required=True)) == [(child, 'cgroup', 'EBUSY')]
    freeze(cgroup, True)
    assert refusals(check(root, frozen_required=True)) == []
    freeze(cgroup, False)


def freeze(cgroup: Path, wanted: bool) -> None:
    fd = os.open(cgroup / 'cgroup.events', os.O_RDONLY)
    poll = select.poll()
    poll.register(fd, select.POLLPRI)
    (cgroup / 'cgroup.freeze').write_text(str(int(wanted)))
    while f'frozen {int(wanted)}' not in os.pread(fd, 100, 0).decode():
        poll.poll(1000)
    os.close(fd)


# ---------------------------------------------------------------- mappings

def vma(line: str, flags: str = 'rd wr mr mw me ac') -> Any:
    mapping = parse_smaps(f'{line}\nRss:  4 kB\nVmFlags: {flags} \n'.encode())[0]
    return MappingKinds().finding(os.getpid(), mapping)


@pytest.mark.parametrize('name', ['', '[heap]', '[stack]', '[anon:jit]'])
@pytest.mark.parametrize('flags', ['ht', 'pf', 'io', 'um', 'uw', 'ui', 'ss', 'sf'])
def test_flags_of_special_memory(flags: str, name: str) -> None:
    assert vma(f'7f0000000000-7f0000001000 rw-p 00000000 00:00 0    {name}', f'rd wr {flags}').errno == 'EOPNOTSUPP'


@pytest.mark.parametrize('path', ['anon_inode:[perf_event]', '[uprobes]',
                                  'anon_inode:kvm-vcpu:0', '/secretmem (deleted)', 'socket:[123]', '[new]'])
def test_names_of_special_memory(path: str) -> None:
    fact = vma(f'7f0000000000-7f0000001000 rw-s 00000000 00:0e 1031                       {path}')
    assert path.removesuffix(' (deleted)') in fact.reason


@pytest.mark.parametrize('path', ['', '[heap]', '[stack]', '[anon:jit]', '[anon_shmem:x]', '/memfd:x (deleted)',
                                  '/usr/lib/x', '/dev/zero (deleted)'])
def test_ordinary_memory(path: str) -> None:
    assert vma(f'7f0000000000-7f0000001000 rw-p 00000000 00:01 1031                       {path}') is None


@pytest.mark.parametrize(('sharing', 'is_refused'), [('s', False), ('p', True)])
def test_memory_of_system_v(sharing: str, is_refused: bool) -> None:
    found = vma(f'7f0000000000-7f0000001000 rw-{sharing} 00000000 00:01 1031              /SYSV00000000 (deleted)')
    assert (found is not None) == is_refused


@pytest.mark.parametrize('name', ['[vvar]', '[vvar_vclock]', '[vdso]'])
def test_the_kernels_own_mappings(name: str) -> None:
    assert vma(f'7f0000000000-7f0000001000 r--p 00000000 00:00 0    {name}', 'rd mr pf io de dd') is None


def test_a_mapping_is_of_one_kind(tmp_path: Path) -> None:
    """Also one whose flags or whose device make it what its path is not."""
    (tmp_path / '[anon_shmem:x]').write_bytes(bytes(4096))
    with (tmp_path / '[anon_shmem:x]').open('r+b') as file, mmap.mmap(-1, 4096), \
            mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE):
        own = read_smaps(os.getpid())
    flags = [frozenset(one.split()) for one in ('rd wr', 'rd wr gd', 'rd wr dp')]
    made_up = [mapping._replace(vm_flags=one) for mapping in own for one in flags]
    kinds = MappingKinds()
    for mapping in own + made_up:
        matching = [kind for kind in kinds.all if mapping.path in kind.names]
        matching = matching or [kind for kind in kinds.all if kind.matches(mapping)]
        assert matching == [kinds.of(mapping)], mapping
    assert len({kinds.of(mapping) for mapping in own}) > 5


def test_mappings_of_this_process_are_ordinary(brood: Brood) -> None:
    assert not [row for row in check(brood.fork()) if row.resource.startswith('vma') and row.severity == 'refusal']


@needs_root
def test_device_mapping(brood: Brood, tmp_path: Path) -> None:
    def map_device(path: str, flags: int) -> Callable[[], None]:
        def work() -> None:
            fd = os.open(path, os.O_RDWR)
            brood.kept = mmap.mmap(fd, 4096, flags=flags)   # type: ignore[attr-defined]
            os.close(fd)
        return work
    zero = brood.fork(map_device('/dev/zero', mmap.MAP_PRIVATE))
    assert not [row for row in check(zero) if row.resource.startswith('vma')]


def test_replaced_mapped_file_is_a_warning(brood: Brood, tmp_path: Path) -> None:
    """A rename over a mapped file makes it deleted, a mount over it does not; the line is made up, the file is real."""
    (tmp_path / 'file').write_bytes(bytes(4096))
    mapping = parse_maps(f'7f0000000000-7f0000001000 r--p 00000000 fe:00 1    {tmp_path}/file\n'.encode())[0]
    kinds = MappingKinds()
    fact = kinds.finding(os.getpid(), mapping)
    assert fact is not None
    assert (fact.severity, fact.errno) == ('warning', 'ENOENT')
    assert kinds.finding(os.getpid(), mapping) is None        # once for the tree


# ---------------------------------------------------------------- open files

def unnameable() -> int:
    """An O_PATH reference to a pipe, which no kind matches."""
    return os.open(f'/proc/thread-self/fd/{os.pipe()[0]}', os.O_PATH)


def test_every_refusal_of_every_task_at_once(brood: Brood) -> None:
    def root() -> list[int]:
        fds = [unnameable(), unnameable()]
        return [*fds, brood.fork()]
    pid, (first, other, child) = brood.ask(root)
    rows = check(pid)
    found = {(row.pid, row.resource) for row in rows if row.severity == 'refusal'}
    assert found >= {(pid, f'fd {first}'), (pid, f'fd {other}'), (child, f'fd {first}'), (child, f'fd {other}')}
    assert 'an O_PATH reference' in fd_rows(rows, first)[0][2]


def test_pipe_with_an_end_outside_is_a_warning(brood: Brood) -> None:
    def inside() -> list[int]:
        return [*os.pipe()]
    read, write = os.pipe()
    outer = brood.fork(lambda: os.close(read))
    rows = check(outer)
    os.close(read)
    os.close(write)
    assert [(severity, errno) for severity, errno, _ in fd_rows(rows, write)] == [('warning', 'EPIPE')]
    pid, ends = brood.ask(inside)
    rows = check(pid)
    assert [fd_rows(rows, end) for end in ends] == [[], []]


def test_pipe_whose_other_end_is_closed_is_none(brood: Brood) -> None:
    def closed() -> int:
        read, write = os.pipe()
        os.close(write)
        return read
    pid, read = brood.ask(closed)
    assert fd_rows(check(pid), read) == []


def test_terminal_with_both_ends_in_the_tree(brood: Brood) -> None:
    def on_terminal() -> list[int]:
        master, slave = os.openpty()
        brood.fork()
        return [master, slave]
    pid, (master, slave) = brood.ask(on_terminal)
    rows = check(pid)
    assert fd_rows(rows, slave) == fd_rows(rows, master) == []


def test_same_terminal_is_told_of_once(brood: Brood) -> None:
    master, slave = os.openpty()

    def on_terminal() -> int:
        os.close(master)
        brood.fork()
        return slave
    try:
        pid, fd = brood.ask(on_terminal)
        [(severity, _, reason)] = fd_rows(check(pid), fd)
        assert (severity, 'outside of the tree' in reason) == ('warning', True)
    finally:
        os.close(master)
        os.close(slave)


def test_thread_with_its_own_fd_table(brood: Brood) -> None:
    def root() -> int:
        found: list[int] = []
        started = threading.Event()

        def thread() -> None:
            assert libc.unshare(0x400) == 0     # CLONE_FILES
            found.append(unnameable())
            started.set()
            brood.wait()
        threading.Thread(target=thread, daemon=True).start()
        started.wait()
        return found[0]
    pid, context = brood.ask(root)
    assert ('refusal', 'EOPNOTSUPP') in [row[:2] for row in fd_rows(check(pid), context)]


def test_lock_on_what_keeps_none_is_a_warning(brood: Brood) -> None:
    def lock() -> int:
        fd = os.open('/dev/null', os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd
    pid, fd = brood.ask(lock)
    assert [row[:2] for row in fd_rows(check(pid), fd)] == [('warning', 'ENOLCK')]
