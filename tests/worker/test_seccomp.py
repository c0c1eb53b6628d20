# SPDX-License-Identifier: LGPL-2.1-or-later
"""seccomp: who may save and restore it, which filters are refused, and images that lie about it.

That it comes back is in tests/victims/seccomp.c.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from ckptd.errors import CkptError, NotSupported
from ckptd.image.manifest import NAME, encode_manifest, read_manifest
from ckptd.image.reader import ImageReader
from ckptd.image.records import TaskAttribute
from ckptd.kernel.seccomp import Filter, may_suspend
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.objects.attributes.seccomp import Filters, SeccompFilter
from ckptd.protocol.requests import Caller
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.lib.brood import Brood, become
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place

pytestmark = [pytest.mark.needs('root', 'ptrace')]

SECCOMP = 317                   # <asm/unistd_64.h>
PR_SET_NO_NEW_PRIVS = 38
NEW_LISTENER = 1 << 3           # <linux/seccomp.h>
ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
RETURN, RETURN_A = 0x06, 0x16   # BPF_RET | BPF_K, BPF_RET | BPF_A


def program(*instructions: tuple[int, int]) -> bytes:
    return b''.join(struct.pack('=HBBI', code, 0, 0, k) for code, k in instructions)


ALLOW_ALL = program((RETURN, ALLOW))


def install(code: bytes, flags: int = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    buffer = ctypes.create_string_buffer(code, len(code))
    return int(libc.syscall(SECCOMP, 1, flags, struct.pack('=HxxxxxxQ', len(code) // 8, ctypes.addressof(buffer))))


def test_a_filter_that_asks_a_supervisor(forked: Callable[..., int], place: Place) -> None:
    """The listener is no fd of the tree. Its other end could not answer a restored task."""
    def supervised() -> None:
        listener = install(asking(), NEW_LISTENER)
        assert listener >= 0
        os.close(listener)

    pid = forked(supervised)
    with pytest.raises(NotSupported, match='asks a supervisor') as refused:
        place.checkpoint(pid)
    assert (refused.value.resource, refused.value.task) == ('seccomp', pid)


def asking() -> bytes:
    """Hand getpgid(2) to the supervisor: load the number of the call, compare, return."""
    return struct.pack('=HBBI', 0x20, 0, 0, 0) + struct.pack('=HBBI', 0x15, 0, 1, 121) + program(
        (RETURN, NOTIFY), (RETURN, ALLOW))


def test_what_notifies() -> None:
    assert Filter(asking(), 0).notifies
    assert not Filter(ALLOW_ALL, 0).notifies
    assert not Filter(program((RETURN_A, NOTIFY)), 0).notifies


def test_a_worker_under_a_filter(forked: Callable[..., int], place: Place) -> None:
    """It may neither read filters nor suspend them: exit status 3, and the name of what is in the way."""
    pid = forked(lambda: install(ALLOW_ALL))

    def work() -> list[object]:
        assert install(ALLOW_ALL) == 0
        assert not may_suspend()
        try:
            place.checkpoint(pid, forked=True)
        except CkptError as error:
            return [error.name, error.exit_status, error.resource, error.task]
        return []

    with Brood() as brood:
        assert brood.ask(work)[1] == ['Refused', 3, 'seccomp', pid]
    place.checkpoint(pid)


@pytest.fixture
def image(forked: Callable[..., int], place: Place) -> Path:
    pid = forked(lambda: install(ALLOW_ALL))
    return place.checkpoint(pid)


def lie(image: Path, record: Filters) -> None:
    with ImageReader(image) as reader:
        assert [one.name for one in reader.every(TaskAttribute)].count('seccomp') == 1
    rewrite(image, TaskAttribute, lambda one: replace(one, data=record.encode()) if one.name == 'seccomp' else one)


@pytest.mark.parametrize('record', [
    Filters(0, ()), Filters(3, ()), Filters(2, ()), Filters(1, (SeccompFilter(ALLOW_ALL, 0),)),
    Filters(2, (SeccompFilter(b'', 0),)), Filters(2, (SeccompFilter(ALLOW_ALL[:7], 0),)),
    Filters(2, (SeccompFilter(ALLOW_ALL * 4097, 0),)), Filters(2, (SeccompFilter(ALLOW_ALL, 8),))],
    ids=['off', 'unknown', 'empty', 'strict', 'nothing', 'cut', 'long', 'listener'])
def test_no_kernel_takes_it(image: Path, place: Place, record: Filters) -> None:
    lie(image, record)
    with DirectWorker() as worker:
        rows = worker.run(place.request(0, 'check-restore', image=image.name, new_pidns=True))['refusals']
    assert [(row['resource'], row['errno']) for row in rows if row['severity'] == 'refusal'] == [('seccomp', 'EBADMSG')]


def test_a_program_that_the_kernel_finds_wrong(image: Path, place: Place) -> None:
    """It has no return. The restart fails and leaves nothing."""
    lie(image, Filters(2, (SeccompFilter(program((0x20, 0)), 0),)))
    with DirectWorker() as worker, pytest.raises(CkptError, match='seccomp'):
        worker.run(place.request(0, 'restore', image=image.name, new_pidns=True))
    settled.reap_orphans()


def test_of_an_ordinary_users_worker(image: Path, place: Place, forked: Callable[..., int]) -> None:
    pid = forked(lambda: become(ORDINARY_UID))
    caller = Caller(ORDINARY_UID, ORDINARY_UID, (), pid, 0, read_status(pid).cap_bnd,
                    start_time=read_stat(pid).start_time)
    manifest = msgspec.structs.replace(read_manifest(image), owner_uid=ORDINARY_UID, owner_gid=ORDINARY_UID)
    (image / NAME).write_bytes(encode_manifest(manifest))
    with DirectWorker() as worker:
        rows = worker.run(place.request(0, 'check-restore', image=image.name, new_pidns=True, caller=caller))
    [row] = [row for row in rows['refusals'] if row['resource'] == 'seccomp']
    assert (row['errno'], row['severity']) == ('EACCES', 'refusal')
    assert 'only an administrator' in row['reason']
    assert 'restore it as root' in row['hint']
