# SPDX-License-Identifier: LGPL-2.1-or-later
"""The namespaces that a tree is born into, if ours do not fit.

    pid     requested (--new-pidns), or because an ordinary user may choose pids in no other. Its first process is a
            few instructions that reap orphans, unless the tree has a process 1 of its own
    user    for an ordinary user: with that uid and gid mapped to themselves
    time    clocks continue where they were: after a reboot, or when the tree had offsets (time_namespaces(7))
"""

import os
import time
from dataclasses import dataclass

from ckptd.errors import Finding, NotSupported
from ckptd.image.manifest import Manifest
from ckptd.image.reader import ImageReader
from ckptd.image.records import Namespaces
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.clone import CLONE_NEWTIME, CLONE_NEWUSER
from ckptd.kernel.creds import CAP_CHECKPOINT_RESTORE, CAP_SYS_ADMIN, capget
from ckptd.kernel.memory import Mem
from ckptd.kernel.prctl import PR_SET_NAME
from ckptd.kernel.task import boot_id
from ckptd.kernel.timens import Offsets, read_offsets, write_offsets
from ckptd.remote.batch import Batch
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub


@dataclass(frozen=True, slots=True)
class BirthNamespaces:
    """The namespaces of a birth."""
    user: bool                         # a new user namespace
    pid: bool                          # a new pid namespace
    clocks: Offsets | None             # offsets in nanoseconds for a new time namespace, None for ours
    bootstrap_is_init: bool = False    # our first child is process 1 of the pid namespace

    def enter(self, bootstrap: Stub) -> list[Finding]:
        """Let the bootstrap make all of them except the pid namespace, which only a child can enter. A namespace that
        is not available and not required is a warning."""
        if self.user:
            _unshare(bootstrap, CLONE_NEWUSER)
            _map_ids(bootstrap.tid)
        if self.clocks is None:
            return []
        try:
            _unshare(bootstrap, CLONE_NEWTIME)
            write_offsets(self.clocks, bootstrap.tid)
        except OSError as error:
            return [Finding(0, '', 'clocks', 'EPERM', f'no time namespace: {error.strerror}; CLOCK_MONOTONIC and'
                            ' CLOCK_BOOTTIME jump', 'run ckptd with CAP_SYS_ADMIN and CAP_SYS_TIME', 'warning')]
        return []


def may_choose_pids() -> bool:
    """Whether clone3(2) accepts set_tid from us in our own pid namespace."""
    effective = capget().effective
    return bool(effective >> CAP_CHECKPOINT_RESTORE & 1 or effective >> CAP_SYS_ADMIN & 1)


def decide(reader: ImageReader, *, new_pidns: bool, brokered: bool) -> BirthNamespaces:
    """Decide which namespaces the image and our rights call for. The pids of a tree from another pid namespace mean
    nothing in ours.

    brokered: the launcher has made the required time namespace and, with new_pidns, the pid namespace.
    """
    if brokered:        # the launcher has made all of them, from the manifest alone
        return BirthNamespaces(False, new_pidns,
                               None if any(read_offsets(os.getpid())) else offsets_for(reader.manifest),
                               bootstrap_is_init=new_pidns)
    user = not may_choose_pids()
    elsewhere = any(record.own_pidns for record in reader.every(Namespaces))
    return BirthNamespaces(user, new_pidns or user or elsewhere, offsets_for(reader.manifest))


def offsets_for(manifest: Manifest) -> Offsets | None:
    """Return the time namespace, as offsets to ours, in which clocks continue where they were; None if ours fits."""
    clocks = manifest.clocks
    if manifest.boot_id == boot_id():
        offsets = Offsets(clocks.monotonic_offset, clocks.boottime_offset)
        return offsets if any(offsets) else None
    # as the tree saw them when it was dumped: the time since then does not exist for it
    return Offsets(clocks.monotonic - time.clock_gettime_ns(time.CLOCK_MONOTONIC),
                   clocks.boottime - time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def _unshare(bootstrap: Stub, flags: int) -> None:
    batch = Batch()
    batch.call('unshare', flags)
    bootstrap.do(batch)


def _map_ids(pid: int) -> None:
    uid, gid = os.getuid(), os.getgid()
    try:
        _write(f'/proc/{pid}/setgroups', 'deny')        # otherwise only root may map groups (user_namespaces(7))
        _write(f'/proc/{pid}/uid_map', f'{uid} {uid} 1')
        _write(f'/proc/{pid}/gid_map', f'{gid} {gid} 1')
    except OSError as error:
        raise NotSupported(f'cannot make a user namespace: {error.strerror}', errno=error.errno, resource='user',
                           hint='allow user namespaces (user.max_user_namespaces), or run as root') from error


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def make_reaper(init: Stub, root: int, root_directory: int) -> None:
    """Turn the first process of a pid namespace into one that reaps orphans and exits like `root`. Afterwards it is
    before its first instruction, and has only its two pages."""
    script = Script(init)
    script.call('prctl', PR_SET_NAME, b'ckptd-init\0')
    script.call('fchdir', root_directory)
    script.call('close_range', 0, (1 << 32) - 1, 0)
    script.do()
    with Mem(init.tid) as mem:
        mem.write(init.arena.code, arch.reaper(root))
    init.tracee.regs = arch.stub_registers(init.arena.code, init.arena.table, stack=init.arena.end - 256)
