# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check for mappings whose memory cannot be dumped, and for mapped files that a restart will not find."""

import os
import re
import stat
from collections.abc import Iterable
from typing import Literal, NamedTuple

from ckptd.errors import Finding
from ckptd.inspect.checks.rows import ProcessIds, guarded, processes
from ckptd.inspect.proc_cache import ProcCache
from ckptd.kernel.maps import Mapping, map_file, stat_mapped
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.shmem import shm_device
from ckptd.objects.files.linked import DeletedFile, link_findings
from ckptd.tree import Task


class _Fact(NamedTuple):
    """A problem with a mapping."""
    errno: str
    reason: str
    hint: str
    severity: Literal['refusal', 'warning'] = 'refusal'


_CLOSE = 'let the program release it before the checkpoint'

# VmFlags of proc_pid_smaps(5) for pages that are not ordinary memory, or whose page faults another process serves
_FLAGS = {
    'ht': _Fact('EOPNOTSUPP', 'huge pages (hugetlb) cannot be dumped yet', 'use transparent huge pages instead'),
    'io': _Fact('EOPNOTSUPP', 'memory of a device', _CLOSE),
    'pf': _Fact('EOPNOTSUPP', 'raw page frames of a device', _CLOSE),
    'sf': _Fact('EOPNOTSUPP', 'a synchronous mapping (MAP_SYNC) of persistent memory', _CLOSE),
    'ss': _Fact('EOPNOTSUPP', 'a shadow stack (control-flow enforcement)',
                'start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off'),
    'ui': _Fact('EOPNOTSUPP', 'page faults are served by a userfaultfd (minor)', _CLOSE),
    'um': _Fact('EOPNOTSUPP', 'page faults are served by a userfaultfd (missing)', _CLOSE),
    'uw': _Fact('EOPNOTSUPP', 'writes are watched by a userfaultfd (write-protect)', _CLOSE),
}
# mappings that the kernel makes in every process (arch/x86/entry/vdso); vvar has 'pf' and 'io'
_OWN = {'[vdso]', '[vvar]', '[vvar_vclock]', '[vsyscall]'}
_NAMED = ('[anon:', '[anon_shmem:', '[heap]', '[stack]')
_PATHS = (
    (re.compile(r'/\[aio\]'), 'a ring of asynchronous I/O (io_setup)'),
    (re.compile(r'/secretmem\b'), 'secret memory (memfd_secret), which only the task can read'),
    (re.compile(r'\[uprobes\]'), 'instructions displaced by uprobes'),
    (re.compile(r'anon_inode:'), 'a mapping of the kernel object'),
    (re.compile(r'socket:'), 'the ring buffer of a packet socket'),
    (re.compile(r'[^/]'), 'a mapping of unknown origin'),
)
_DEV_ZERO = os.makedev(1, 5)


def check_vmas(tasks: Iterable[Task], cache: ProcCache) -> list[Finding]:
    """List one row for each mapping, resource 'vma START-END'. A warning about a file appears once in the tree."""
    files = MappedFiles()
    found: list[Finding] = []
    for process in processes(tasks):
        found += guarded(process.leader, 'maps', _check_process, process, files, cache)
    return found


def _check_process(process: ProcessIds, files: 'MappedFiles', cache: ProcCache) -> list[Finding]:
    tid, leader = process.reader.tid, process.leader
    return [Finding(leader.tid, leader.comm, f'vma {mapping.start:x}-{mapping.end:x}', fact.errno, fact.reason,
                    fact.hint, fact.severity)
            for mapping in cache.mappings(process.reader)
            if (fact := check_mapping(mapping) or _check_segment(tid, mapping) or files.check(tid, mapping))]


def check_mapping(mapping: Mapping) -> _Fact | None:
    """Check a mapping by its line and flags."""
    path = mapping.path
    if path in _OWN:
        return None
    if path.startswith(_NAMED):
        path = ''
    for pattern, what in _PATHS:
        if pattern.match(path):
            return _Fact('EOPNOTSUPP', f'{what}: {path}', _CLOSE)
    return next((fact for flag, fact in _FLAGS.items() if flag in mapping.vm_flags), None)


def _check_segment(tid: int, mapping: Mapping) -> _Fact | None:
    """Refuse a segment of another IPC namespace. shmctl(2) uses the caller's namespace, where the same id is another
    segment or none."""
    if not mapping.path.startswith('/SYSV') or os.makedev(mapping.major, mapping.minor) != shm_device():
        return None
    if os.path.samefile(f'/proc/{tid}/ns/ipc', '/proc/self/ns/ipc'):  # noqa: PTH121
        return None
    return _Fact('EOPNOTSUPP', 'a System V segment of another IPC namespace than that of ckptd', _CLOSE)


class MappedFiles:
    """Files mapped by name. Each is checked once, because a thousand processes may map the same libraries."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, str], _Fact | None] = {}

    def check(self, tid: int, mapping: Mapping) -> _Fact | None:
        # memfds, System V segments and shared anonymous memory have no name in the file system
        if not mapping.path.startswith('/') or os.makedev(mapping.major, mapping.minor) == shm_device():
            return None
        key = (mapping.major, mapping.minor, mapping.inode, mapping.path)
        if key in self._known:
            return self._known[key]
        fact = _check_file(tid, mapping)
        self._known[key] = fact if fact and fact.severity == 'refusal' else None
        return fact


def _check_file(tid: int, mapping: Mapping) -> _Fact | None:
    mapped = stat_mapped(tid, mapping)
    named = lstat_of_task(tid, mapping.file_path)
    is_there = named is not None and named.st_ino == (mapped.st_ino if mapped else mapping.inode)
    of = mapped or (named if is_there else None)
    if of and stat.S_ISCHR(of.st_mode):
        return None if of.st_rdev == _DEV_ZERO else _device('character', mapping, of)
    if of and stat.S_ISBLK(of.st_mode):
        return _device('block', mapping, of)
    if is_there:
        return None
    if mapped is None and mapping.deleted:
        return _Fact('EPERM', f'{mapping.file_path} is deleted and its content cannot be read',
                     'run ckptd as root (it needs CAP_CHECKPOINT_RESTORE for /proc/PID/map_files)')
    if mapping.deleted and mapped and mapped.st_nlink:
        file = DeletedFile(tid, tid, mapping.file_path, mapped, map_file(tid, mapping))
        return next((_Fact(one.errno, one.reason, one.hint) for one in link_findings(file)), None)
    if mapping.deleted:
        return None         # its content goes into the image
    return _Fact('ENOENT', f'{mapping.path} is another file now, or hidden by a mount',
                 'a restart maps files by path: remove the mount or put the file back', 'warning')


def _device(sort: str, mapping: Mapping, of: os.stat_result) -> _Fact:
    number = f'{os.major(of.st_rdev)}:{os.minor(of.st_rdev)}'
    return _Fact('EOPNOTSUPP', f'memory of the {sort} device {number}: {mapping.path}', _CLOSE)
