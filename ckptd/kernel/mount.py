# SPDX-License-Identifier: LGPL-2.1-or-later
"""mount(2)."""

from ckptd.kernel.decl import c_int, c_ulong, c_void_p, libc

MS_REC, MS_PRIVATE = 0x4000, 0x40000        # <linux/mount.h>


@libc
def mount(source: c_void_p, target: c_void_p, filesystemtype: c_void_p, mountflags: c_ulong,
          data: c_void_p) -> c_int: ...
