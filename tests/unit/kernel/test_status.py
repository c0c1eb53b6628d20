# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/status."""

import ctypes
import os
import signal
from collections.abc import Callable

import psutil
import pytest

from ckptd.kernel.prctl import prctl
from ckptd.kernel.status import NO_TAGS, parse_ns_ids, parse_status, read_ns_ids, read_status

PR_SET_NAME = 15        # <linux/prctl.h>
PR_SET_NO_NEW_PRIVS = 38
CAPTURED = b"""Name:\ta b\\n\\\\n)
Umask:\t0027
State:\tt (tracing stop)
Tgid:\t312
Ngid:\t0
Pid:\t313
PPid:\t200
TracerPid:\t77
Uid:\t1000\t1001\t1002\t1003
Gid:\t100\t101\t102\t103
FDSize:\t64
Groups:\t4 24 1000\x20
NStgid:\t312\t12
NSpid:\t313\t13
NSpgid:\t200\t0
NSsid:\t199\t0
Kthread:\t0
VmPeak:\t    3060 kB
VmLck:\t      48 kB
VmRSS:\t    1784 kB
Threads:\t2
SigQ:\t0/96365
SigPnd:\t0000000000000001
ShdPnd:\t0000000000000002
SigBlk:\t0000000000000004
SigIgn:\t0000000000001000
SigCgt:\t8000000000000000
CapInh:\t0000000000000001
CapPrm:\t000001ffffffffff
CapEff:\t0000000000000003
CapBnd:\t000001fffeffffff
CapAmb:\t0000000000000005
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t3
Cpus_allowed:\t3
x86_Thread_features:\t
untag_mask:\t0x81ffffffffffffff
"""
ZOMBIE = b"""Name:\tsh
State:\tZ (zombie)
Tgid:\t9
Pid:\t9
PPid:\t1
TracerPid:\t0
Uid:\t0\t0\t0\t0
Gid:\t0\t0\t0\t0
Groups:\t\x20
NStgid:\t9
NSpid:\t9
NSpgid:\t9
NSsid:\t9
Threads:\t1
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t0000000000000000
"""


def test_every_field_of_a_captured_file() -> None:
    assert parse_status(CAPTURED)._asdict() == {
        'name': 'a b\n\\n)', 'umask': 0o27, 'state': 't', 'tgid': 312, 'pid': 313, 'ppid': 200, 'tracer_pid': 77,
        'uids': (1000, 1001, 1002, 1003), 'gids': (100, 101, 102, 103), 'groups': (4, 24, 1000),
        'ns_tgid': (312, 12), 'ns_pid': (313, 13), 'ns_pgid': (200, 0), 'ns_sid': (199, 0), 'kthread': False,
        'vm_rss': 1784 * 1024, 'vm_lck': 48 * 1024, 'threads': 2, 'sig_pnd': 1, 'shd_pnd': 2, 'sig_blk': 4,
        'sig_ign': 0x1000, 'sig_cgt': 1 << 63, 'cap_inh': 1, 'cap_prm': 0x1FFFFFFFFFF, 'cap_eff': 3,
        'cap_bnd': 0x1FFFEFFFFFF,
        'cap_amb': 5, 'no_new_privs': True, 'seccomp': 2, 'seccomp_filters': 3,
        'untag_mask': 0x81FFFFFFFFFFFFFF}


def test_a_zombie_on_an_old_kernel_lacks_half_of_it() -> None:
    status = parse_status(ZOMBIE)
    assert (status.state, status.umask, status.vm_rss, status.groups, status.sig_blk) == ('Z', 0, 0, (), 0)
    assert (status.kthread, status.seccomp, status.seccomp_filters, status.no_new_privs) == (False, 0, 0, False)
    assert status.untag_mask == NO_TAGS


def test_ids_alone_are_as_in_the_whole() -> None:
    status = parse_status(CAPTURED)
    assert parse_ns_ids(CAPTURED) == (status.ns_tgid, status.ns_pid, status.ns_pgid, status.ns_sid)
    assert read_ns_ids(os.getpid()).pid[0] == os.getpid()


@pytest.mark.parametrize('name', [b'a\nb', b'back\\slash', b'\\n', b'Pid:\t1', b'\xc3('])
def test_a_real_process_with_an_odd_name(name: bytes, forked: Callable[..., int]) -> None:
    buffer = ctypes.create_string_buffer(name)
    pid = forked(lambda: prctl(PR_SET_NAME, ctypes.addressof(buffer)))
    status = read_status(pid)
    assert os.fsencode(status.name) == name
    assert status.pid == pid


def test_this_process_as_others_have_it() -> None:
    status, other = read_status(os.getpid()), psutil.Process()
    assert status.uids[:3] == tuple(other.uids())
    assert status.gids[:3] == tuple(other.gids())
    assert set(status.groups) == set(os.getgroups())
    assert (status.ppid, status.threads) == (other.ppid(), other.num_threads())
    assert status.vm_rss == pytest.approx(other.memory_info().rss, rel=0.2)
    assert status.ns_pid[0] == status.pid == status.tgid == os.getpid()
    umask = os.umask(0)
    os.umask(umask)
    assert status.umask == umask


def test_masks_and_flags_of_a_child(forked: Callable[..., int]) -> None:
    def setup() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1, signal.SIGRTMAX})
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGWINCH, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    status = read_status(forked(setup))
    assert status.sig_blk == 1 << signal.SIGUSR1 - 1 | 1 << signal.SIGRTMAX - 1
    assert status.sig_ign & 1 << signal.SIGUSR2 - 1
    assert status.sig_cgt & 1 << signal.SIGWINCH - 1
    assert status.shd_pnd == 1 << signal.SIGUSR1 - 1
    assert status.no_new_privs


def test_no_such_task() -> None:
    with pytest.raises(ProcessLookupError):
        read_status(2**22 + 1)
