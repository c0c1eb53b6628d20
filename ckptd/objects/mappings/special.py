# SPDX-License-Identifier: LGPL-2.1-or-later
"""Special memory that cannot be dumped, by the flags or the path of a mapping of any kind."""

import re

from ckptd.errors import Finding
from ckptd.kernel.maps import Mapping
from ckptd.kernel.shmem import is_object_of_shm_mount
from ckptd.objects.files.base import finding
from ckptd.objects.mappings.base import RELEASE
from ckptd.objects.support import Support

SUPPORT = Support('special memory: files of huge pages (hugetlbfs), secret memory, memory of devices, shadow '
                  'stacks, memory that a userfaultfd serves', dumped='no', restored='no', refused='all')

# VmFlags of proc_pid_smaps(5) for pages that are not ordinary memory, or whose page faults another process serves
_FLAGS = {
    'ht': ('huge pages of a file (hugetlbfs) cannot be dumped yet', 'use MAP_HUGETLB or MFD_HUGETLB instead'),
    'io': ('memory of a device', RELEASE),
    'pf': ('raw page frames of a device', RELEASE),
    'sf': ('a synchronous mapping (MAP_SYNC) of persistent memory', RELEASE),
    'ss': ('a shadow stack (control-flow enforcement)',
           'start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off'),
    'ui': ('page faults are served by a userfaultfd (minor)', RELEASE),
    'um': ('page faults are served by a userfaultfd (missing)', RELEASE),
    'uw': ('writes are watched by a userfaultfd (write-protect)', RELEASE),
}
_HUGE = frozenset({'ht'})
_ORDINARY = frozenset({'', '[heap]', '[stack]'})
_NAMED = ('[anon:', '[anon_shmem:')
# an ordinary path begins with a slash and with none of these
_PATHS = (
    (re.compile(r'/secretmem\b'), 'secret memory (memfd_secret), which only the task can read'),
    (re.compile(r'\[uprobes\]'), 'instructions displaced by uprobes'),
    (re.compile(r'anon_inode:'), 'a mapping of the kernel object'),
    (re.compile(r'socket:'), 'the ring buffer of a packet socket'),
    (re.compile(r'[^/]'), 'a mapping of unknown origin'),
)


def special_memory(mapping: Mapping) -> Finding | None:
    """Refuse a mapping whose pages the kernel or another process serves in its own way."""
    path = mapping.path
    if path not in _ORDINARY and not path.startswith(_NAMED):
        for pattern, what in _PATHS:
            if pattern.match(path):
                return finding('EOPNOTSUPP', f'{what}: {path}', RELEASE)
    found = mapping.vm_flags - (_HUGE if is_object_of_shm_mount(mapping) else frozenset())
    return next((finding('EOPNOTSUPP', *fact) for flag, fact in _FLAGS.items() if flag in found), None)
