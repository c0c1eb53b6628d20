# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time namespaces (time_namespaces(7)): clocks continue where they were, after a reboot or if the tree had offsets."""

import os
import time
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.manifest import Manifest
from ckptd.kernel.clone import CLONE_NEWTIME
from ckptd.kernel.task import boot_id
from ckptd.kernel.timens import Offsets, setns, unshare, write_offsets
from ckptd.objects.namespaces.base import BirthNamespaces, NamespaceKind, unshare_stub
from ckptd.objects.support import Support
from ckptd.remote.stub import Stub


class TimeNamespace(NamespaceKind, name='time'):
    """A time namespace. One that is not available is a warning."""
    support = Support('time', warned='clocks that jump where no time namespace can be made')

    def is_made(self, birth: BirthNamespaces) -> bool:
        return True

    def enter(self, birth: BirthNamespaces, bootstrap: Stub) -> Iterator[Finding]:
        if birth.clocks is None:
            return
        try:
            unshare_stub(bootstrap, CLONE_NEWTIME)
            write_offsets(birth.clocks, bootstrap.tid)
        except OSError as error:
            yield Finding(0, '', 'clocks', 'EPERM', f'no time namespace: {error.strerror}; CLOCK_MONOTONIC and'
                          ' CLOCK_BOOTTIME jump', 'run ckptd with CAP_SYS_ADMIN and CAP_SYS_TIME', 'warning')


def offsets_for(manifest: Manifest) -> Offsets | None:
    """Return the time namespace, as offsets to ours, in which clocks continue where they were; None if ours fits."""
    clocks = manifest.clocks
    if manifest.boot_id == boot_id():
        offsets = Offsets(clocks.monotonic_offset, clocks.boottime_offset)
        return offsets if any(offsets) else None
    # as the tree saw them when it was dumped: the time since then does not exist for it
    return Offsets(clocks.monotonic - time.clock_gettime_ns(time.CLOCK_MONOTONIC),
                   clocks.boottime - time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def enter_clocks(offsets: Offsets) -> None:
    """Move the calling process, of one thread, into a new time namespace. OSError."""
    unshare(CLONE_NEWTIME)
    write_offsets(offsets)
    fd = os.open('/proc/self/ns/time_for_children', os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWTIME)
    finally:
        os.close(fd)
