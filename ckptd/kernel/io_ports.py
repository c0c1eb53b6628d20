# SPDX-License-Identifier: LGPL-2.1-or-later
"""Permissions of a thread to use I/O ports (ioperm(2)), read as a register set of ptrace(2)."""

import ctypes
import errno

from ckptd.kernel.ptrace import PTRACE_GETREGSET, iovec, ptrace

NT_386_IOPERM = 0x201       # <elf.h>
_BITMAP = 65536 // 8
_known = {'has': True}      # until the kernel has reported that it has no such set


def has_io_bitmap(tid: int) -> bool:
    """Whether a stopped tracee has called ioperm(2). False on a kernel without CONFIG_X86_IOPL_IOPERM."""
    if not _known['has']:
        return False
    buffer = ctypes.create_string_buffer(_BITMAP)
    vector = iovec(ctypes.addressof(buffer), _BITMAP)
    try:
        ptrace(PTRACE_GETREGSET, tid, NT_386_IOPERM, ctypes.byref(vector))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENXIO, errno.ENODATA):
            raise
        _known['has'] = error.errno != errno.EINVAL
        return False
    return vector.iov_len > 0
