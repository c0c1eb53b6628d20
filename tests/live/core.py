# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image of a real process, made with ptrace and /proc by this test code alone: what a core is tried with."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from ckptd.image import records as r
from ckptd.image.grammar import Record
from ckptd.image.writer import ImageWriter, Incoming
from ckptd.kernel.maps import Mapping, read_smaps
from ckptd.kernel.memory import Mem, PageMap
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_auxv, read_threads
from tests.unit.image.samples import IMAGE, PAGE, manifest, task

KINDS = {'[heap]': r.HEAP, '[stack]': r.STACK, '[vdso]': r.VDSO, '[vvar]': r.VVAR, '[vvar_vclock]': r.VVAR,
         '[vsyscall]': r.VSYSCALL}


def dump(pid: int, spool: Path) -> Path:
    """Stop the process, write an image of it, let it go."""
    tids = read_threads(pid)
    with ImageWriter(Incoming(spool, IMAGE)) as writer, ExitStack() as stack:
        tracees = [stack.enter_context(Tracee.seize(tid)) for tid in tids]
        for tracee in tracees:
            tracee.stop()
        parts = {'TREE': tree(pid, tids), 'TASK': tasks(tracees), 'FILE': [r.FdTable(1, ())],
                 'MEM ': memory(pid, writer)}
        for code, records in parts.items():
            for one in records:
                writer.part(code).write(one)
        writer.publish(manifest(root=pid, tasks=len(tids), command='threads'))
    return spool / IMAGE


def tree(pid: int, tids: list[int]) -> Iterator[Record]:
    stat = read_stat(pid)
    count = len(tids)
    yield r.Header(pid, count, 1, 0, PAGE, 'x86_64')
    yield r.TaskIds(tuple(tids), (pid,) * count, (stat.ppid,) * count, (stat.pgrp,) * count, (stat.session,) * count)
    for tid in tids:
        yield task(tid, parent=0 if tid == pid else pid, comm=stat.comm)


def tasks(tracees: list[Tracee]) -> Iterator[Record]:
    for tracee in tracees:
        yield r.Credentials(tracee.tid, (1, 2, 3, 4), (5, 6, 7, 8), (), (0,) * 5, 0, 0, 0)
        yield r.Scheduling(tracee.tid, 0, 0, 20, 0, 0, 0, 0, b'', 0, 0)
        yield r.Registers(tracee.tid, 62, bytes(tracee.regs), tracee.xstate())
        yield r.ThreadSignals(tracee.tid, tracee.sigmask, 0, 2, 0, tracee.pending(shared=False))
    leader = tracees[0]
    yield r.ProcessState(leader.tid, 0, 1000, leader.pending(shared=True), 0, 0)
    yield r.SignalActions(1, (r.SigAction(0, 0, 0, 0),) * 64)
    yield r.Fs(1, '/', '/', 0)


def memory(pid: int, writer: ImageWriter) -> Iterator[Record]:
    stat = read_stat(pid)
    layout = (stat.start_code, stat.end_code, stat.start_data, stat.end_data, stat.start_brk, stat.start_brk,
              stat.start_stack, stat.arg_start, stat.arg_end, stat.env_start, stat.env_end)
    backings: dict[str, int] = {}
    yield r.Mm(1, layout, read_auxv(pid), 0, 1, 0)
    with Mem(pid) as mem, PageMap(pid) as pagemap:
        for number, mapping in enumerate(read_smaps(pid), 1):
            kind, key = r.ANON, 0
            if mapping.path in KINDS:
                kind = KINDS[mapping.path]
            elif mapping.path.startswith('/dev/zero'):
                kind, key = r.SHARED_MEMORY, number
                yield r.SharedMemory(key, r.SHMEM, mapping.size, '', 0, 0, 0, 0, 0, 0)
            elif mapping.inode:
                if mapping.path not in backings:
                    backings[mapping.path] = len(backings) + 1
                    yield backing(backings[mapping.path], mapping.path)
                kind, key = r.FILE_PRIVATE, backings[mapping.path]
            protection = mapping.read | mapping.write << 1 | mapping.execute << 2
            yield r.Vma(1, mapping.start, mapping.end, protection, 0, kind, mapping.offset, key, 0,
                        ' '.join(mapping.vm_flags), mapping.path)
            yield from pages(mapping, kind, key, mem, pagemap, writer)


def backing(key: int, path: str) -> r.Backing:
    at = Path(path).stat()
    return r.Backing(key, path, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_mode, 0, ())


def pages(mapping: Mapping, kind: int, key: int, mem: Mem, pagemap: PageMap, writer: ImageWriter) -> Iterator[Record]:
    if kind in (r.VVAR, r.VSYSCALL):
        return
    whole = kind in (r.SHARED_MEMORY, r.VDSO)
    span = (mapping.start, mapping.end)
    base = mapping.start - mapping.offset if kind == r.SHARED_MEMORY else 0
    runs = []
    for start, end in [span] if whole else pagemap.anonymous([span]):
        extent = writer.data.add([mem.read(start, end - start)])
        runs.append(r.PageRun(start - base, (end - start) // PAGE, extent.part, extent.offset))
    if runs:
        shared = kind == r.SHARED_MEMORY
        yield r.PageRuns(r.OF_SHARED_MEMORY if shared else r.OF_MM, key if shared else 1, tuple(runs))
