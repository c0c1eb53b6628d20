# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables of the architecture: registers, system call numbers, code. One module per architecture, with the same
names."""

import platform

from ckptd.errors import NotSupported

if platform.machine() != 'x86_64':
    raise NotSupported(f'ckptd has no tables for {platform.machine()} yet', resource='architecture',
                       hint='ckptd runs on x86-64; another architecture is a table in ckptd/kernel/arch/')
