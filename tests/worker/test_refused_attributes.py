# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attributes that no restart could bring back: a checkpoint of a task that has one is refused, and says so."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import NotSupported
from ckptd.inspect.scan import scan_tree
from ckptd.kernel.io_ports import has_io_bitmap
from ckptd.kernel.prctl import PR_SCHED_CORE, PR_SCHED_CORE_SCOPE_THREAD, core_cookie
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.status import NO_TAGS, read_status
from ckptd.objects.attributes import core_scheduling
from ckptd.objects.attributes.registry import findings
from tests.worker.driver import Place

pytestmark = [pytest.mark.needs('root', 'ptrace')]

MODIFY_LDT, IOPERM = 154, 173       # <asm/unistd_64.h>
PR_SCHED_CORE_CREATE = 1            # <linux/prctl.h>
WRITE = 0x11                        # function of modify_ldt(2)
SEGMENT = b''.join(number.to_bytes(4, 'little') for number in (3, 0x1000, 0xFFF, 1 | 1 << 6))       # struct user_desc


def call(number: int, *arguments: object) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))


def make_segment() -> None:
    assert call(MODIFY_LDT, WRITE, SEGMENT, len(SEGMENT)) == 0


def test_a_local_descriptor_table(forked: Callable[..., int], tmp_path: Path) -> None:
    pid = forked(make_segment)
    with pytest.raises(NotSupported, match='has a local descriptor table') as refused:
        Place(tmp_path).make().checkpoint(pid)
    assert (refused.value.resource, refused.value.task) == ('LDT', pid)
    assert read_status(pid).tracer_pid == 0


def test_ports(forked: Callable[..., int], tmp_path: Path) -> None:
    has_ports = call(IOPERM, 0x80, 1, 0) == 0       # gives nothing; ENOSYS without CONFIG_X86_IOPL_IOPERM
    pid = forked(lambda: None)
    with Tracee.seize(pid) as tracee:
        tracee.stop()
        assert not has_io_bitmap(tracee.tid)
    if not has_ports:
        pytest.skip('this kernel has no ioperm(2)')
    pid = forked(lambda: call(IOPERM, 0x80, 1, 1))
    with pytest.raises(NotSupported, match='may use I/O ports'):
        Place(tmp_path).make().checkpoint(pid)


def test_tagged_addresses() -> None:
    """Few processors have them, so the mask of this process stands in for one that was captured."""
    task, status = scan_tree([os.getpid()]).root, read_status(os.getpid())
    assert status.untag_mask == NO_TAGS
    assert findings(task, status) == []
    [row] = findings(task, status._replace(untag_mask=0x81FFFFFFFFFFFFFF))
    assert (row.resource, row.errno, row.severity) == ('address tags', 'EOPNOTSUPP', 'refusal')
    assert '0x81ffffffffffffff' in row.reason


def test_a_cookie_of_core_scheduling(forked: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel or the processor has none, a value stands in for one."""
    def make_cookie() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SCHED_CORE, PR_SCHED_CORE_CREATE, 0, PR_SCHED_CORE_SCOPE_THREAD, 0)

    pid = forked(make_cookie)
    task, status = scan_tree([pid]).root, read_status(pid)
    if not core_cookie(pid):
        assert findings(task, status) == []
        monkeypatch.setattr(core_scheduling, 'core_cookie', lambda tid: 77)
    [row] = findings(task, status)
    assert (row.resource, row.severity, row.pid) == ('core scheduling', 'warning', pid)
