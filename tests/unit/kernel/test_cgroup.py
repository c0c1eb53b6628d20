# SPDX-License-Identifier: LGPL-2.1-or-later
"""cgroups: finding them in both layouts, and the freezer of real ones."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.kernel.cgroup import Cgroup, CgroupMount, find_mount, mount_of
from ckptd.kernel.mountinfo import parse_mountinfo
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2

PURE = b'30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n'
HYBRID = (b'31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n'
          b'37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer\n'
          b'41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n')
CONTAINER = (b'50 41 0:26 /box/inner /mnt/a rw - cgroup2 cgroup2 rw\n'
             b'51 41 0:26 /box /mnt/b rw - cgroup2 cgroup2 rw\n')


@pytest.mark.parametrize(('text', 'path', 'root'), [
    (PURE, '/sys/fs/cgroup', '/'), (HYBRID, '/sys/fs/cgroup/unified', '/'), (CONTAINER, '/mnt/b', '/box')])
def test_layouts(text: bytes, path: str, root: str) -> None:
    assert mount_of(parse_mountinfo(text)) == CgroupMount(Path(path), root)


def test_no_v2_hierarchy() -> None:
    assert mount_of(parse_mountinfo(HYBRID.replace(b'cgroup2 cgroup2', b'cgroup cgroup'))) is None


def test_a_name_that_is_too_long_is_that_of_no_cgroup(tmp_path: Path) -> None:
    """As an image may have one in Task.cgroup."""
    assert not Cgroup(tmp_path / ('x' * 5000)).exists
    assert Cgroup(tmp_path).exists


def test_directories_below_a_mount_of_a_part() -> None:
    mount = CgroupMount(Path('/mnt/b'), '/box')
    assert mount.directory('/box/inner/x') == Path('/mnt/b/inner/x')
    assert mount.directory('/box') == Path('/mnt/b')
    for other in ('/boxer', '/box/../x', '/../box', ''):
        with pytest.raises(FileNotFoundError):
            mount.directory(other)


def test_what_is_outside_of_the_cgroup_namespace_has_no_directory() -> None:
    with pytest.raises(FileNotFoundError):
        CgroupMount(Path('/mnt'), '/').directory('/../init.scope')
    assert CgroupMount(Path('/mnt'), '/..').directory('/../init.scope') == Path('/mnt/init.scope')


@pytest.mark.needs('cgroup2')
class TestReal:
    """In a cgroup of the test's own."""

    def test_of_a_process(self, cgroup: Path, forked: Callable[..., int]) -> None:
        pid, group = forked(), Cgroup(cgroup)
        group.attach(pid)
        assert Cgroup.of(pid) == group
        assert group.name == read_cgroup2(pid)
        assert Cgroup.named(group.name) == group
        assert group.procs() == group.threads() == [pid]
        assert group.parent == Cgroup(cgroup.parent)
        assert group.writable()

    def test_the_top_has_no_parent_and_no_freezer(self) -> None:
        top = Cgroup(find_mount().path)
        assert (top.name, top.parent) == ('/', None)
        if not (top.path / 'cgroup.freeze').exists():       # in a cgroup namespace the top is like any other
            assert not top.frozen
            assert not top.frozen_wanted
            with pytest.raises(OSError, match=r'cgroup\.freeze'):
                top.freeze()

    def test_freeze_and_thaw(self, cgroup: Path, forked: Callable[..., int]) -> None:
        pid, group = forked(), Cgroup(cgroup)
        group.attach(pid)
        assert (group.frozen_wanted, group.frozen) == (False, False)
        group.freeze()
        assert group.wait(True, time.monotonic() + 5)
        assert (group.frozen_wanted, group.frozen) == (True, True)
        group.thaw()
        assert group.wait(False, time.monotonic() + 5)
        assert (group.frozen_wanted, group.frozen) == (False, False)

    def test_freezes_nest(self, cgroup: Path, forked: Callable[..., int]) -> None:
        outer = Cgroup(cgroup)
        inner = outer.create('inner')
        inner.attach(forked())
        outer.freeze()
        assert inner.wait(True, time.monotonic() + 5)
        assert (inner.frozen_wanted, inner.frozen) == (False, True)
        inner.freeze()
        outer.thaw()
        assert outer.wait(False, time.monotonic() + 5)
        assert inner.frozen

    def test_deadline(self, cgroup: Path, forked: Callable[..., int]) -> None:
        group = Cgroup(cgroup)
        group.attach(forked())
        began = time.monotonic()
        assert not group.wait(True, began + 0.02)
        assert time.monotonic() - began < 2
        assert not group.wait(True, 0)

    def test_another_fd_ends_the_wait(self, cgroup: Path, forked: Callable[..., int]) -> None:
        group = Cgroup(cgroup)
        group.attach(forked())
        reader, writer = os.pipe()
        waker = threading.Timer(0.02, os.write, (writer, b'!'))
        waker.start()
        try:
            assert not group.wait(True, time.monotonic() + 30, also=reader)
        finally:
            waker.join()
            os.close(reader)
            os.close(writer)

    def test_members_of_all_below(self, cgroup: Path, forked: Callable[..., int]) -> None:
        outer = Cgroup(cgroup)
        inner = outer.create('a').create('b')
        first, second = forked(), forked()
        outer.attach(first)
        inner.attach(second)
        assert outer.procs() == [first]
        assert outer.procs(recursive=True) == outer.threads(recursive=True) == sorted([first, second])
        assert [group.path.name for group in outer.walk()] == [cgroup.name, 'a', 'b']

    def test_remove_only_when_empty(self, cgroup: Path, forked: Callable[..., int]) -> None:
        outer = Cgroup(cgroup)
        inner = outer.create('inner')
        pid = forked()
        inner.attach(pid)
        with pytest.raises(OSError) as caught:
            inner.remove()
        assert caught.value.errno == errno.EBUSY
        outer.attach(pid)
        assert inner.wait_empty(time.monotonic() + 5)
        inner.remove()
        assert not inner.exists
        with pytest.raises(FileNotFoundError):
            _ = inner.frozen

    def test_kill_while_frozen(self, cgroup: Path, forked: Callable[..., int]) -> None:
        pid, group = forked(), Cgroup(cgroup)
        group.attach(pid)
        group.freeze()
        assert group.wait(True, time.monotonic() + 5)
        group.kill()
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        assert (status.si_code, status.si_status) == (os.CLD_KILLED, signal.SIGKILL)
        assert read_stat(pid).state == 'Z'
