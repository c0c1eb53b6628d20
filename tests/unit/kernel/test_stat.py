# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stat line, with names that try to break it."""

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.kernel.prctl import prctl
from ckptd.kernel.stat import PF_EXITING, PF_KTHREAD, parse_stat, read_stat

PR_SET_NAME = 15        # <linux/prctl.h>
CAPTURED = (b'6918 (cat) R 6903 6903 3999 1025 -1 4194304 98 0 0 0 0 0 0 0 20 5 3 0 185677 3133440 383 '
            b'18446744073709551615 94561791754240 94561791774121 140725484589664 0 0 0 0 0 0 0 0 0 17 1 40 1 0 0 0 '
            b'94561791790128 94561791791744 94562798018560 140725484595930 140725484595950 140725484595951 '
            b'140725484597227 256\n')


def test_every_field_of_a_captured_line() -> None:
    stat = parse_stat(CAPTURED)
    assert stat._asdict() == {
        'pid': 6918, 'comm': 'cat', 'state': 'R', 'ppid': 6903, 'pgrp': 6903, 'session': 3999, 'tty_nr': 1025,
        'tpgid': -1, 'flags': 4194304, 'num_threads': 3, 'start_time': 185677, 'nice': 5,
        'start_code': 94561791754240, 'end_code': 94561791774121, 'start_stack': 140725484589664, 'exit_signal': 17,
        'rt_priority': 40, 'policy': 1, 'start_data': 94561791790128, 'end_data': 94561791791744,
        'start_brk': 94562798018560, 'arg_start': 140725484595930, 'arg_end': 140725484595950,
        'env_start': 140725484595951, 'env_end': 140725484597227, 'exit_code': 256}


@given(comm=st.binary(max_size=15).filter(lambda name: b'\0' not in name))
def test_any_name_between_the_parentheses(comm: bytes) -> None:
    stat = parse_stat(CAPTURED.replace(b'(cat)', b'(' + comm + b')'))
    assert stat == parse_stat(CAPTURED)._replace(comm=os.fsdecode(comm))


@pytest.mark.parametrize('name', [b'a b', b') R 1 1', b'(((', b'new\nline', b'\xff\xfe', b'tab\tslash\\n', b''])
def test_a_real_process_with_an_odd_name(name: bytes, forked: Callable[..., int]) -> None:
    buffer = ctypes.create_string_buffer(name)
    pid = forked(lambda: prctl(PR_SET_NAME, ctypes.addressof(buffer)))
    stat = read_stat(pid)
    assert os.fsencode(stat.comm) == name
    assert (stat.pid, stat.ppid, stat.state in 'SR') == (pid, os.getpid(), True)


def test_this_process_as_psutil_has_it() -> None:
    stat, other = read_stat(os.getpid()), psutil.Process()
    assert stat.ppid == other.ppid()
    assert stat.comm == other.name()[:15]
    assert stat.nice == other.nice()
    assert stat.num_threads == other.num_threads()
    since_boot = other.create_time() - psutil.boot_time()
    assert stat.start_time == pytest.approx(since_boot * os.sysconf('SC_CLK_TCK'), abs=200)
    assert (stat.pgrp, stat.session) == (os.getpgrp(), os.getsid(0))
    assert not stat.flags & PF_KTHREAD


def test_command_line_lies_where_stat_says() -> None:
    stat = read_stat(os.getpid())
    with Path('/proc/self/mem').open('rb', buffering=0) as memory:
        memory.seek(stat.arg_start)
        assert memory.read(stat.arg_end - stat.arg_start) == Path('/proc/self/cmdline').read_bytes()


def test_zombie_then_gone(forked: Callable[..., int]) -> None:
    pid = forked()
    os.kill(pid, signal.SIGTERM)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    stat = read_stat(pid)
    assert stat.state == 'Z'
    assert stat.flags & PF_EXITING
    assert os.WTERMSIG(stat.exit_code) == signal.SIGTERM


def test_no_such_task() -> None:
    with pytest.raises(ProcessLookupError):
        read_stat(2**22 + 1)
    with pytest.raises(ProcessLookupError):
        read_stat(os.getpid(), 1)
