# SPDX-License-Identifier: LGPL-2.1-or-later
"""NUMA memory policies (set_mempolicy(2), mbind(2))."""

import ctypes

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_ulong, c_void_p, syscall

MPOL_DEFAULT = 0
MPOL_F_ADDR, MPOL_F_MEMS_ALLOWED = 1 << 1, 1 << 2
MPOL_MF_MOVE = 1 << 1
# more bits than any kernel has nodes (CONFIG_NODES_SHIFT is at most 10); the kernel counts one bit less than it is told
MASK_BITS = 1025
MASK_SIZE = 128         # bytes


@syscall(NR['get_mempolicy'])
def _get_mempolicy(mode: c_void_p, nodemask: c_void_p, maxnode: c_ulong, addr: c_void_p, flags: c_ulong) -> c_int: ...


def allowed_nodes() -> int:
    """Return the mask of the nodes that the caller may take memory from; 0 without CONFIG_NUMA."""
    mask = ctypes.create_string_buffer(MASK_SIZE)
    try:
        _get_mempolicy(None, ctypes.addressof(mask), MASK_BITS, None, MPOL_F_MEMS_ALLOWED)
    except OSError:
        return 0
    return int.from_bytes(mask.raw, 'little')


def are_nodes_gone(nodes: bytes) -> bool:
    """Whether no node of a mask is there: the kernel then refuses it (EINVAL). Some policies name no node."""
    wanted = int.from_bytes(nodes[:MASK_SIZE], 'little')
    return bool(wanted) and not wanted & allowed_nodes()
