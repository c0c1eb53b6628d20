# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who descends from whom, of real processes; and of numbers that become another process's meanwhile."""

import os
import subprocess

import pytest

from ckptd.kernel import ancestry
from ckptd.kernel.ancestry import is_below
from ckptd.kernel.stat import Stat, read_stat


def began(pid: int) -> int:
    return read_stat(pid).start_time


def test_ourselves_children_and_theirs() -> None:
    own = os.getpid()
    assert is_below(own, own, began(own))
    with subprocess.Popen(['sh', '-c', 'sleep 1000 & echo $!; wait'], stdout=subprocess.PIPE) as child, \
            subprocess.Popen(['sleep', '1000']) as other:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert is_below(child.pid, own, began(own))
        assert is_below(grandchild, own, began(own))
        assert is_below(grandchild, child.pid, began(child.pid))
        assert not is_below(other.pid, child.pid, began(child.pid))
        assert not is_below(own, child.pid, began(child.pid))
        assert not is_below(grandchild, child.pid, began(child.pid) + 1)
        assert not is_below(grandchild, 0, 0)
        child.kill()
        child.wait()
        os.kill(grandchild, 9)
        other.kill()
    assert not is_below(child.pid, own, began(own))


@pytest.mark.parametrize(('again', 'below'), [({}, True), ({20: (1, 5)}, False), ({20: (10, 77)}, False),
                                              ({30: (1, 3)}, False)])
def test_a_parent_whose_number_is_anothers_is_none(monkeypatch: pytest.MonkeyPatch, again: dict[int, tuple[int, int]],
                                                   below: bool) -> None:
    """30 is a child of 20, and that of 10: as they are read first, and as they are read again."""
    first = {10: (1, 1), 20: (10, 5), 30: (20, 3)}
    seen: set[int] = set()

    def read(pid: int) -> Stat:
        parent, start_time = again.get(pid, first[pid]) if pid in seen else first[pid]
        seen.add(pid)
        return read_stat(os.getpid())._replace(pid=pid, ppid=parent, start_time=start_time)

    monkeypatch.setattr(ancestry, 'read_stat', read)
    assert is_below(30, 10, 1) == below
