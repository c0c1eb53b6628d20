# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check for mappings whose memory cannot be dumped, and for mapped files that a restart will not find."""

from collections.abc import Iterable
from dataclasses import replace

from ckptd.errors import Finding
from ckptd.inspect.checks.rows import ProcessIds, guarded, processes
from ckptd.inspect.proc_cache import ProcCache
from ckptd.objects.mappings.registry import MappingKinds
from ckptd.tree import Task


def check_vmas(tasks: Iterable[Task], cache: ProcCache) -> list[Finding]:
    """List one row for each mapping, resource 'vma START-END'. A warning about a file appears once in the tree."""
    kinds = MappingKinds()
    found: list[Finding] = []
    for process in processes(tasks):
        found += guarded(process.leader, 'maps', _check_process, process, kinds, cache)
    return found


def _check_process(process: ProcessIds, kinds: MappingKinds, cache: ProcCache) -> list[Finding]:
    tid, leader = process.reader.tid, process.leader
    return [replace(found, pid=leader.tid, comm=leader.comm, resource=f'vma {mapping.start:x}-{mapping.end:x}')
            for mapping in cache.mappings(process.reader) if (found := kinds.finding(tid, mapping))]
