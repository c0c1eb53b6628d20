# SPDX-License-Identifier: LGPL-2.1-or-later
"""Remote system calls: what they return, and that the task is afterwards as it was, whatever happens to its tracer."""

import contextlib
import ctypes
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptd import faults
from ckptd.kernel.maps import read_maps
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.status import read_status
from ckptd.remote import borrow as remote_module
from ckptd.remote.batch import Batch
from ckptd.remote.borrow import OwnIds, Remote
from ckptd.remote.interleave import finish
from tests.worker.conftest import in_child

pytestmark = [pytest.mark.needs('ptrace', 'gcc'), pytest.mark.usefixtures('tracer')]

Stop = Callable[[int], tuple[Tracee, OwnIds]]
VICTIMS = ['interrupted', 'registers', 'signals']


def one_of_each(tracee: Tracee, ids: OwnIds) -> dict[str, Any]:
    """A batch with results, buffers, input and an error."""
    batch = Batch()
    action, text = batch.buffer(32), batch.buffer(8, b'hello')
    calls = {'getpid': batch.call('getpid'), 'action': batch.call('rt_sigaction', signal.SIGUSR1, 0, action, 8),
             'error': batch.call('rt_sigaction', 999, 0, action, 8)}
    remote = Remote(tracee, ids, read_maps(tracee.tid), read_status(tracee.tid).sig_cgt)
    try:
        finish(remote.open())
        results = finish(remote.run(tracee, ids, batch))
    finally:
        finish(remote.close())
    found: dict[str, Any] = {'pid': results.value(calls['getpid']), 'text': results.data(text)}
    assert results.value(calls['action']) == 0
    with pytest.raises(OSError, match='remote rt_sigaction: Invalid argument'):
        results.value(calls['error'])
    return found


@pytest.mark.parametrize('name', VICTIMS)
def test_a_batch_leaves_no_trace(victim: Any, tracer: Stop, name: str) -> None:
    one = victim(name)
    tracee, ids = tracer(one.pid)
    before = picture(tracee)
    assert one_of_each(tracee, ids) == {'pid': one.pid, 'text': b'hello\0\0\0'}
    assert picture(tracee) == before
    tracee.detach()
    one.finish()


def test_a_batch_that_is_given_up_leaves_no_trace(victim: Any, tracer: Stop) -> None:
    """The task is waited for, or its code would be overwritten while it runs."""
    one = victim('registers')
    tracee, ids = tracer(one.pid)
    before, batch = picture(tracee), Batch()
    batch.call('nanosleep', batch.buffer(16, struct.pack('<2q', 0, 10_000_000)), 0)
    remote = Remote(tracee, ids, read_maps(tracee.tid), read_status(tracee.tid).sig_cgt)
    try:
        finish(remote.open())
        begun = remote.run(tracee, ids, batch)
        next(begun)
        begun.close()
    finally:
        finish(remote.close())
    assert picture(tracee) == before
    tracee.detach()
    one.finish()


def picture(tracee: Tracee) -> dict[str, Any]:
    """Whatever a remote call might disturb."""
    status = read_status(tracee.tid)
    return {'regs': bytes(tracee.regs), 'xstate': tracee.xstate(), 'mask': tracee.sigmask,
            'maps': read_maps(tracee.tid), 'pending': (status.sig_pnd, status.shd_pnd),
            'queue': tracee.pending(shared=False),
            'shared': tracee.pending(shared=True)}


@pytest.mark.parametrize('point', ['remote-mapped', 'running-remote'])
@pytest.mark.parametrize('name', VICTIMS)
def test_a_task_heals_itself_when_its_tracer_dies(victim: Any, monkeypatch: pytest.MonkeyPatch, name: str,
                                                  point: str) -> None:
    one = victim(name)
    monkeypatch.setitem(faults._PLAN, point, 'kill')
    status = in_child(lambda: trace(one.pid))
    assert os.WTERMSIG(status) == signal.SIGKILL
    one.finish()


def trace(pid: int) -> None:
    tracee = Tracee.seize(pid)
    tracee.stop()
    one_of_each(tracee, OwnIds(pid, pid))


@pytest.mark.parametrize('sig', [signal.SIGSTOP, signal.SIGURG])
def test_a_signal_that_comes_meanwhile_is_not_lost(victim: Any, tracer: Stop, monkeypatch: pytest.MonkeyPatch,
                                                   sig: signal.Signals) -> None:
    one = victim('interrupted')
    tracee, ids = tracer(one.pid)
    sent: list[int] = []

    def send_once(point: str) -> None:
        if point == 'running-remote' and not sent:
            sent.append(sig)
            # to this thread: of a process the kernel chooses one that runs
            assert ctypes.CDLL(None).tgkill(one.pid, one.pid, sig) == 0

    monkeypatch.setattr(remote_module, 'fault', send_once)
    assert one_of_each(tracee, ids)['pid'] == one.pid
    assert tracee.deferred == ([] if sig == signal.SIGSTOP else [sig])     # of SIGSTOP the kernel knows already
    tracee.detach()
    if sig == signal.SIGSTOP:
        _, status = os.waitpid(one.pid, os.WUNTRACED)
        assert os.WSTOPSIG(status) == sig
        os.kill(one.pid, signal.SIGCONT)
    one.finish()


def test_a_stop_that_is_taken_back_meanwhile(victim: Any, tracer: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP and then SIGCONT is no stop, whenever they come."""
    one = victim('registers')
    tracee, ids = tracer(one.pid)
    to_send = [signal.SIGSTOP, signal.SIGCONT]

    def send_next(point: str) -> None:
        if point == 'running-remote' and to_send:
            os.kill(one.pid, to_send.pop(0))

    monkeypatch.setattr(remote_module, 'fault', send_next)
    assert one_of_each(tracee, ids)['pid'] == one.pid
    assert not to_send
    tracee.detach()
    one.finish()


def test_a_stopped_job_stays_stopped(victim: Any, tracer: Stop) -> None:
    one = victim('registers')
    os.kill(one.pid, signal.SIGSTOP)
    _, status = os.waitpid(one.pid, os.WUNTRACED)
    assert os.WSTOPSIG(status) == signal.SIGSTOP
    tracee, ids = tracer(one.pid)
    assert tracee.stop_signal == signal.SIGSTOP
    one_of_each(tracee, ids)
    tracee.detach()
    # let go, it runs to its stop by itself, and nobody is told: it was stopped before
    deadline = time.monotonic() + 10
    while read_status(one.pid).state not in 'Tt':
        assert time.monotonic() < deadline
        os.sched_yield()
    os.kill(one.pid, signal.SIGCONT)
    one.finish()


def test_a_restartable_sequence_is_started_again(victim: Any, tracer: Stop) -> None:
    """The kernel clears rseq_cs of a task that runs elsewhere; after a remote call it must be there again."""
    one = victim('registers')
    tracee, ids = tracer(one.pid)
    config = tracee.rseq()
    if not config.rseq_abi_pointer:
        pytest.skip('this libc registers no rseq')
    with Path(f'/proc/{one.pid}/mem').open('r+b', buffering=0) as mem:
        stack = tracee.regs.rsp - 4096 & ~31
        kept = os.pread(mem.fileno(), 36, stack)
        # version, flags, start_ip, post_commit_offset, abort_ip: a sequence around a place that is never executed;
        # the kernel looks for the signature in front of abort_ip all the same (rseq_get_rseq_cs in kernel/rseq.c)
        sequence = struct.pack('<2I3Q', 0, 0, 0x1000, 16, stack + 36) + struct.pack('<I', config.signature)
        os.pwrite(mem.fileno(), sequence, stack)
        os.pwrite(mem.fileno(), struct.pack('<Q', stack), config.rseq_abi_pointer + 8)
        one_of_each(tracee, ids)
        assert os.pread(mem.fileno(), 8, config.rseq_abi_pointer + 8) == struct.pack('<Q', stack)
        os.pwrite(mem.fileno(), bytes(8), config.rseq_abi_pointer + 8)
        os.pwrite(mem.fileno(), kept, stack)
    tracee.detach()
    one.finish()


def test_a_task_that_is_killed_meanwhile(victim: Any, tracer: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    one = victim('registers')
    tracee, ids = tracer(one.pid)

    def kill(point: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)

    monkeypatch.setattr(remote_module, 'fault', kill)
    with pytest.raises(ProcessLookupError):
        one_of_each(tracee, ids)
