# SPDX-License-Identifier: LGPL-2.1-or-later
"""Targets, the tree scan and the hold on its tasks, on real processes."""

import dataclasses
import os
import resource
import signal
import threading
from pathlib import Path

import psutil
import pytest

from ckptd.errors import InvalidArgument, NoSuchTarget
from ckptd.inspect.scan import Handles, is_same, resolve_target, scan_tree
from ckptd.kernel.cgroup import Cgroup
from ckptd.target import CgroupTarget, ProcessTarget, UnitTarget
from ckptd.tree import Tree
from tests.lib.brood import Brood, libc

CLONE_NEWPID = 0x20000000


def dead_pid() -> int:
    """A pid that was a process and is none."""
    pid = os.posix_spawn('/bin/true', ['true'], {})
    os.waitpid(pid, 0)
    return pid


def family(brood: Brood) -> tuple[int, list[int]]:
    """A root with two children; a thread of it has a child of its own, and the first child has one too."""
    def root() -> list[int]:
        first, below = brood.ask(lambda: brood.fork())
        second = brood.fork()
        found: list[int] = []
        started = threading.Event()

        def thread() -> None:
            found.extend([threading.get_native_id(), brood.fork()])
            started.set()
            brood.wait()

        threading.Thread(target=thread, daemon=True).start()
        started.wait()
        return [first, below, second, *found]
    return brood.ask(root)


def test_order_is_depth_first_threads_after_their_leader(brood: Brood) -> None:
    root, (first, below, second, thread, of_thread) = family(brood)
    tree = scan_tree([root])
    assert [task.tid for task in tree] == [root, thread, first, below, second, of_thread]
    assert [task.depth for task in tree] == [0, 0, 1, 2, 1, 1]
    assert [task.parent_tid for task in tree] == [0, root, root, first, root, thread]
    assert [task.vppid for task in tree] == [os.getpid(), os.getpid(), root, first, root, root]
    assert [task.tgid for task in tree] == [root, root, first, below, second, of_thread]


def test_ids_are_those_that_another_tool_sees(brood: Brood) -> None:
    root, _ = family(brood)
    tree = scan_tree([root])
    seen = psutil.Process(root)
    assert {task.tid for task in tree.leaders} == {root, *(child.pid for child in seen.children(recursive=True))}
    for task in tree.leaders:
        assert task.ppid == psutil.Process(task.tid).ppid()
        assert (task.vpgid, task.vsid) == (os.getpgid(task.tid), os.getsid(task.tid))


def leave_a_zombie() -> int:
    """A child with status 3 that nobody has waited for; its pid."""
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def test_zombie_keeps_its_exit_code(brood: Brood) -> None:
    parent, zombie = brood.ask(leave_a_zombie)
    task = scan_tree([parent])[zombie]
    assert task.is_zombie
    assert os.waitstatus_to_exitcode(task.exit_code) == 3


def test_a_zombie_is_no_target(brood: Brood) -> None:
    parent, zombie = brood.ask(leave_a_zombie)
    with pytest.raises(NoSuchTarget, match='has ended, and only its exit status is left') as caught:
        resolve_target(ProcessTarget(zombie))
    assert str(parent) in caught.value.hint
    assert resolve_target(ProcessTarget(parent)).roots == (parent,)


def test_threads_outlive_their_leader(brood: Brood) -> None:
    def root() -> int:
        tid: list[int] = []
        begun = threading.Event()

        def thread() -> None:
            tid.append(threading.get_native_id())
            begun.set()
            brood.wait()
            os._exit(0)

        threading.Thread(target=thread, daemon=True).start()
        begun.wait()
        return tid[0]

    def exit_leader() -> int:
        tid = root()
        os.write(handshake[1], tid.to_bytes(4, 'little'))
        libc.syscall(60, 0)     # exit(2) of this thread alone
        return 0

    handshake = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(brood._end)
        exit_leader()
    brood.pids.append(pid)
    tid = int.from_bytes(os.read(handshake[0], 4), 'little')
    for end in handshake:
        os.close(end)
    while not scan_tree([pid])[pid].is_zombie:      # it has nothing left to do but exit
        os.sched_yield()
    assert [(task.tid, task.is_zombie) for task in scan_tree([pid])] == [(pid, True), (tid, False)]


@pytest.mark.needs('root')
def test_ids_of_a_tree_in_its_own_pid_namespace(brood: Brood) -> None:
    def maker() -> list[int]:
        assert libc.unshare(CLONE_NEWPID) == 0
        return list(brood.ask(lambda: (os.setsid(), brood.fork())[1]))
    _, (init, _) = brood.ask(maker)
    tree = scan_tree([init])
    assert [(task.vtid, task.vtgid, task.vppid, task.vpgid, task.vsid) for task in tree] == [(1, 1, 0, 1, 1),
                                                                                          (2, 2, 1, 1, 1)]


def test_several_roots_follow_each_other_and_a_dead_one_is_left_out(brood: Brood) -> None:
    first, second = brood.fork(), brood.fork()
    tree = scan_tree([second, dead_pid(), first])
    assert [task.tid for task in tree] == [second, first]


def test_root_inside_another_root_is_scanned_once(brood: Brood) -> None:
    root, child = brood.ask(lambda: brood.fork())
    assert [task.tid for task in scan_tree([root, child])] == [root, child]


def test_dead_root() -> None:
    pid = dead_pid()
    with pytest.raises(NoSuchTarget) as caught:
        scan_tree([pid])
    assert caught.value.task == pid


def test_scan_of_a_tree_that_changes_all_the_time(brood: Brood) -> None:
    def fork_for_ever() -> None:
        if os.fork() == 0:
            while True:
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)
                if os.getppid() == 1:
                    os._exit(0)
    root = brood.fork(fork_for_ever)
    try:
        for _ in range(100):
            tree = scan_tree([root])
            assert tree.root.tid == root
            assert all(task.parent_tid in tree for task in tree if task.parent_tid)
    finally:
        for task in scan_tree([root]).leaders[1:2]:
            os.kill(task.tid, signal.SIGKILL)


def test_chain(brood: Brood) -> None:
    def chain(left: int) -> int:
        return brood.ask(lambda: chain(left - 1))[0] if left else 0
    root = brood.ask(lambda: chain(30))[0]
    assert [task.depth for task in scan_tree([root])] == list(range(31))


# ---------------------------------------------------------------- targets

def test_process_targets(brood: Brood) -> None:
    pid = brood.fork()
    target = resolve_target(ProcessTarget(pid))
    assert (target.roots, target.cgroup, target.unit) == ((pid,), None, None)


def test_thread_is_not_a_target(brood: Brood) -> None:
    root, (_, _, _, thread, _) = family(brood)
    with pytest.raises(InvalidArgument, match='thread') as caught:
        resolve_target(ProcessTarget(thread))
    assert str(root) in caught.value.hint


def test_the_root_cgroup_is_not_a_target() -> None:
    with pytest.raises(InvalidArgument, match='whole system'):
        resolve_target(CgroupTarget('/'))


def test_targets_that_are_not_there() -> None:
    for target in (ProcessTarget(dead_pid()), UnitTarget('no-such-unit-anywhere.service'),
                   CgroupTarget('/no/such/cgroup')):
        with pytest.raises(NoSuchTarget):
            resolve_target(target)


def unit(cgroup: Path, name: str, *pids: int) -> Path:
    path = cgroup / name
    path.mkdir(parents=True)
    for pid in pids:
        (path / 'cgroup.procs').write_text(str(pid))
    return path


@pytest.fixture
def manager(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cgroup of a service manager whose units may be named here. No process of it runs."""
    monkeypatch.setattr('ckptd.kernel.units.read_cgroup2', lambda pid: f'{Cgroup(cgroup).name}/init.scope')
    return cgroup if os.geteuid() == 0 else unit(cgroup, f'user@{os.geteuid()}.service')


def test_cgroup_and_unit_with_a_daemonized_task(brood: Brood, manager: Path) -> None:
    main, child = brood.ask(lambda: brood.fork())
    daemon = brood.fork()
    path = unit(manager, 'a.slice/ckptd-test.service', daemon, main)
    unit(path, 'below', child)
    by_unit = resolve_target(UnitTarget('ckptd-test.service'))
    assert (by_unit.unit, by_unit.roots) == ('ckptd-test.service', (main, daemon))
    assert by_unit.cgroup == f'{Cgroup(manager).name}/a.slice/ckptd-test.service'
    by_path = resolve_target(CgroupTarget(by_unit.cgroup))
    assert (by_path.unit, by_path.roots) == (None, (main, daemon))
    assert [task.tid for task in scan_tree(by_unit.roots)] == [main, child, daemon]


def test_a_unit_of_somebody_elses_making(brood: Brood, manager: Path) -> None:
    """A subtree that is delegated has no units: not while the real one runs, and not when it does not."""
    real, fake = brood.fork(), brood.fork()
    unit(manager, 'user.slice/user@4242.service/ckptd-twice.service', fake)
    with pytest.raises(NoSuchTarget, match='no unit'):
        resolve_target(UnitTarget('ckptd-twice.service'))
    unit(manager, 'system.slice/ckptd-twice.service', real)
    assert resolve_target(UnitTarget('ckptd-twice.service')).roots == (real,)


def test_empty_cgroup(manager: Path) -> None:
    unit(manager, 'ckptd-empty.service')
    with pytest.raises(NoSuchTarget, match='no processes'):
        resolve_target(UnitTarget('ckptd-empty.service'))


def test_a_unit_that_has_moved_and_left_processes_behind(brood: Brood, manager: Path) -> None:
    unit(manager, 'a.slice/ckptd-twice.scope', brood.fork())
    unit(manager, 'b.slice/ckptd-twice.scope')
    with pytest.raises(InvalidArgument) as caught:
        resolve_target(UnitTarget('ckptd-twice.scope'))
    assert '/a.slice/ckptd-twice.scope' in caught.value.message
    assert '/b.slice/ckptd-twice.scope' in caught.value.message


# ---------------------------------------------------------------- handles

def test_handles_see_a_death(brood: Brood) -> None:
    root, child = brood.ask(lambda: brood.fork())
    tree = scan_tree([root])
    with Handles(tree) as handles:
        assert (len(handles), handles.complete, handles.gone, handles.dead(tree)) == (2, True, [], [])
        signal.pidfd_send_signal(handles[tree[child]], signal.SIGKILL)
        os.waitid(os.P_PIDFD, handles[tree.root], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        while not handles.dead(tree):
            os.sched_yield()
        assert handles.dead(tree) == [tree[child]]


def test_handles_know_a_recycled_pid(brood: Brood) -> None:
    task = scan_tree([brood.fork()]).root
    other = dataclasses.replace(task, start_time=task.start_time - 1)
    assert is_same(task)
    assert not is_same(other)
    with Handles(Tree((other,))) as handles:
        assert (len(handles), handles.gone) == (0, [other])


def test_handles_beyond_the_limit_of_open_files(brood: Brood) -> None:
    def limited() -> list[object]:
        tree = scan_tree([os.getpid()])
        for _ in range(3):
            brood.fork()
        tree = scan_tree([os.getpid()])
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
        Handles.SPARE = 298
        with Handles(tree) as handles:
            return [len(handles), handles.complete, len(handles.dead(tree))]
    assert brood.ask(limited)[1] == [2, False, 0]


def test_handles_raise_the_soft_limit(brood: Brood) -> None:
    def limited() -> list[int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000))
        tree = scan_tree([os.getpid()])
        with Handles(tree):
            return list(resource.getrlimit(resource.RLIMIT_NOFILE))
    assert brood.ask(limited)[1] == [1 + Handles.SPARE, 1000]
