# SPDX-License-Identifier: LGPL-2.1-or-later
"""AMX tiles: the permission of a process to use them (ARCH_REQ_XCOMP_PERM of arch_prctl(2)), and space for them in a
thread. Their data is set with all other registers, which the kernel refuses for a thread without that space."""

import ctypes
import struct
from collections.abc import Iterable
from functools import cache

from ckptd.errors import Finding
from ckptd.image.grammar import U64, Struct, layout
from ckptd.image.reader import ImageTask
from ckptd.image.records import Registers
from ckptd.kernel.arch import x86_64 as arch
from ckptd.objects.attributes.base import (
    Attribute,
    DumpedTask,
    Reader,
    RestartRights,
    RestoredTask,
    Scope,
    about,
)
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch
from ckptd.remote.interleave import Steps

_XSTATE_BV_AT = 512         # Intel SDM 1, 13.4.2


@layout
class Permissions(Struct):
    """Permissions. components: of XSAVE, as a mask, without those that a process has by default."""
    components: U64


class TilePermission(Attribute[Permissions, int], name='xstate permissions', scope=Scope.PROCESS):
    support = Support('permission to use AMX', refused='a processor that lacks it')

    def ask(self, batch: Batch) -> Reader[int]:
        out = batch.buffer(8)
        # before Linux 5.16 it fails, and there is no permission
        batch.call('arch_prctl', arch.ARCH_GET_XCOMP_PERM, out)
        return lambda results: int.from_bytes(results.data(out), 'little')

    def dump(self, of: DumpedTask, answer: int) -> Permissions | None:
        asked = answer & ~_own(arch.ARCH_GET_XCOMP_PERM)
        return Permissions(asked) if asked else None

    def obstacles(self, record: Permissions, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        if missing := record.components & ~_own(arch.ARCH_GET_XCOMP_SUPP):
            yield about(task.vpid, 'xstate', 'EOPNOTSUPP', f'may use the components {missing:#x} of XSAVE (AMX), which '
                        'this machine does not have', 'restore it on a processor with the features of the one that it '
                        'was dumped on')

    def restore(self, record: Permissions, to: RestoredTask) -> None:
        for number in range(record.components.bit_length()):
            if record.components >> number & 1:
                to.script.call('arch_prctl', arch.ARCH_REQ_XCOMP_PERM, number, about='the permission to use AMX')


class RoomForTiles(Attribute[Registers, None], name='room for tiles'):
    support = TilePermission.support

    def dump(self, of: DumpedTask, answer: None) -> None:
        return None

    def restore(self, record: Registers, to: RestoredTask) -> Steps[None] | None:
        if len(record.xstate) < _XSTATE_BV_AT + 8:
            return None
        [in_use] = struct.unpack_from('<Q', record.xstate, _XSTATE_BV_AT)
        return _make_room(to) if in_use >> arch.XTILEDATA & 1 else None


def _make_room(to: RestoredTask) -> Steps[None]:
    yield from to.script.run()      # the permission comes first
    yield from to.stub.run_code(arch.USE_TILES, arch.TILE_CONFIG)


@cache
def _own(option: int) -> int:
    """Return a mask of our own components: those of a process that has asked for none."""
    value = ctypes.c_uint64()
    try:
        arch.arch_prctl(option, ctypes.byref(value))
    except OSError:
        return 0
    return value.value
