# SPDX-License-Identifier: LGPL-2.1-or-later
"""The decision into which namespaces a tree is born, if ours do not fit."""

import os

from ckptd.image.reader import ImageReader
from ckptd.image.records import Namespaces
from ckptd.kernel.timens import read_offsets
from ckptd.objects.namespaces.base import BirthNamespaces
from ckptd.objects.namespaces.pid import make_reaper, may_choose_pids
from ckptd.objects.namespaces.time import enter_clocks, offsets_for

# re-exported for the launcher of a worker, and for the start of a tree
__all__ = ['BirthNamespaces', 'decide', 'enter_clocks', 'make_reaper', 'offsets_for']


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
