# SPDX-License-Identifier: LGPL-2.1-or-later
"""What other tools say of a live tree, against what an image says of it: ps, prlimit, psutil, gdb, /proc/PID/mem.

Each function answers sentences, one for each difference. The tree must not have changed since the image was made.
"""

import os
import re
import signal
import stat
import subprocess
from collections.abc import Iterable, Iterator
from mmap import MAP_PRIVATE
from pathlib import Path

import psutil

from ckptd.image.cores.export import write_core
from ckptd.image.cores.plan import exportable
from ckptd.image.reader import ImageReader, ImageTask, Memory
from ckptd.image.records import (
    ANON,
    HEAP,
    PAGE,
    SHARED_MEMORY,
    STACK,
    Backing,
    Credentials,
    FdTable,
    Fs,
    Limits,
    Mm,
    SavedFile,
    Scheduling,
    SharedMemory,
    SignalActions,
    ThreadPointers,
    ThreadSignals,
)

POLICIES = {'TS': 0, 'FF': 1, 'RR': 2, 'B': 3, 'IDL': 5, 'DLN': 6}      # ps(1) cls, <linux/sched.h>
RESOURCES = ('CPU', 'FSIZE', 'DATA', 'STACK', 'CORE', 'RSS', 'NPROC', 'NOFILE', 'MEMLOCK', 'AS', 'LOCKS', 'SIGPENDING',
             'MSGQUEUE', 'NICE', 'RTPRIO', 'RTTIME')                   # <linux/resource.h>, as prlimit(1) names them
INFINITY = 2**64 - 1
COLUMNS = ('lwp', 'pid', 'ppid', 'pgid', 'sid', 'ruid', 'euid', 'suid', 'fuid', 'rgid', 'egid', 'sgid', 'fgid', 'cls',
           'rtprio', 'ni', 'blocked', 'ignored', 'caught', 's', 'comm')
REGISTER = re.compile(r'[a-z][a-z0-9_]+')
# gdb before version 14 looks for these in a live process of an AMD processor where an Intel has them; and a sleep that
# was interrupted goes on as restart_syscall(2), which shows in orig_rax
LEFT_OUT = re.compile(r'orig_rax|k[0-7]|zmm\d+|[xy]mm(1[6-9]|2\d|3[01])|pkru')


def tool(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, 'LC_ALL': 'C', 'DEBUGINFOD_URLS': ''}).stdout


def alive(reader: ImageReader) -> list[ImageTask]:
    return [task for task in reader.tasks if chr(task.record.state) not in 'ZX']


def processes(reader: ImageReader) -> list[ImageTask]:
    """Leaders that live."""
    return [task for task in alive(reader) if task.is_leader]


def own_threads(pid: int, tids: Iterable[int]) -> list[int]:
    """Those that the program has made. The kernel makes others for requests of an io_uring, and the image has none of
    them."""
    return [tid for tid in tids if not Path(f'/proc/{pid}/task/{tid}/comm').read_text().startswith('iou-wrk-')]


def compare(name: str, what: str, image: object, view: object) -> Iterator[str]:
    if image != view:
        yield f'{name}: {what}: the image has {image!r}, it is {view!r}'


# ---------------------------------------------------------------- ps

def of_ps(reader: ImageReader) -> Iterator[str]:
    """Ids, names, credentials, scheduling, signals."""
    pids = ','.join(str(task.vpid) for task in reader.tasks if task.is_leader)
    columns = [word for column in COLUMNS for word in ('-o', f'{column}=')]
    rows = [line.split(None, len(COLUMNS) - 1) for line in tool('ps', '-L', '-p', pids, '-ww', *columns).splitlines()]
    seen = {int(row[0]): dict(zip(COLUMNS, row, strict=True)) for row in rows
            if own_threads(int(row[1]), [int(row[0])])}
    yield from compare('ps', 'tasks', sorted(task.vpid for task in reader.tasks), sorted(seen))
    for task in reader.tasks:
        yield from _of_ps_row(reader, task, seen[task.vpid])


def _of_ps_row(reader: ImageReader, task: ImageTask, row: dict[str, str]) -> Iterator[str]:
    who = f'ps {task.vpid}'
    ids = [int(row[name]) for name in ('lwp', 'pid', 'ppid', 'pgid', 'sid')]
    yield from compare(who, 'ids', [task.vpid, task.vtgid, task.vppid, task.vpgid, task.vsid], ids)
    zombie = chr(task.record.state) in 'ZX'
    # ps(1) shows a dot for what cannot be printed
    comm = ''.join(letter if letter.isprintable() else '.' for letter in task.record.comm)
    yield from compare(who, 'comm', comm, row['comm'])
    yield from compare(who, 'state', zombie, row['s'] == 'Z')
    if zombie:
        return
    credentials = reader.get(Credentials, task.vpid)
    for kind, ours in ('u', credentials.uids), ('g', credentials.gids):
        yield from compare(who, f'{kind}ids', list(ours), [int(row[f'{which}{kind}id']) for which in 'resf'])
    of = reader.get(Scheduling, task.vpid)
    yield from compare(who, 'policy', of.policy, POLICIES[row['cls']])
    yield from compare(who, 'priority', of.priority, 0 if row['rtprio'] == '-' else int(row['rtprio']))
    if row['ni'] != '-':
        yield from compare(who, 'nice', of.nice - 20, int(row['ni']))
    actions = reader.get(SignalActions, task.record.sighand_id).actions
    handlers = {number: action.handler for number, action in enumerate(actions, 1)}
    yield from compare(who, 'blocked', reader.get(ThreadSignals, task.vpid).mask, int(row['blocked'], 16))
    ignored = _mask(number for number, at in handlers.items() if at == signal.SIG_IGN)
    caught = _mask(number for number, at in handlers.items() if at > signal.SIG_IGN)
    yield from compare(who, 'ignored and caught', (ignored, caught), (int(row['ignored'], 16), int(row['caught'], 16)))


def _mask(numbers: Iterator[int]) -> int:
    return sum(1 << number - 1 for number in numbers)


# ---------------------------------------------------------------- prlimit

def of_prlimit(reader: ImageReader) -> Iterator[str]:
    """Limits, through prlimit(2) where the image has them from /proc."""
    for task in processes(reader):
        # of another user's process prlimit(2) wants CAP_SYS_RESOURCE, which root may not have
        if set(reader.get(Credentials, task.vpid).uids) != {os.getuid()}:
            continue
        said = tool('prlimit', '--pid', str(task.vpid), '--raw', '--noheadings', '--output', 'RESOURCE,SOFT,HARD')
        view = {row.split()[0]: tuple(INFINITY if limit == 'unlimited' else int(limit) for limit in row.split()[1:])
                for row in said.splitlines()}
        limits = {name: (limit.soft, limit.hard)
                  for name, limit in zip(RESOURCES, reader.get(Limits, task.vpid).limits, strict=True)}
        yield from compare(f'prlimit {task.vpid}', 'limits', limits, view)


# ---------------------------------------------------------------- psutil

def of_psutil(reader: ImageReader) -> Iterator[str]:
    """Files, directories, executable, affinity, I/O priority, threads, mappings."""
    for task in processes(reader):
        process = psutil.Process(task.vpid)
        who = f'psutil {task.vpid}'
        threads = [one.vpid for one in alive(reader) if one.vtgid == task.vpid]
        seen = own_threads(task.vpid, (thread.id for thread in process.threads()))
        yield from compare(who, 'threads', sorted(threads), sorted(seen))
        of = reader.get(Scheduling, task.vpid)
        yield from compare(who, 'affinity', [cpu for cpu in range(len(of.affinity) * 8)
                                             if of.affinity[cpu // 8] >> cpu % 8 & 1], process.cpu_affinity())
        yield from compare(who, 'ioprio', (of.ioprio >> 13, of.ioprio & 0x1fff), tuple(process.ionice()))
        # of a directory that was removed psutil shows the name that it had
        yield from compare(who, 'cwd', reader.get(Fs, task.record.fs_id).cwd.removesuffix(' (deleted)'), process.cwd())
        yield from compare(who, 'exe', reader.get(Backing, reader.get(Mm, task.record.mm_id).exe).path, process.exe())
        yield from _of_files(reader, task, process)
        yield from _of_mappings(reader, task, process)


def _of_files(reader: ImageReader, task: ImageTask, process: psutil.Process) -> Iterator[str]:
    who = f'psutil {task.vpid}'
    table = reader.get(FdTable, task.record.files_id).fds
    yield from compare(who, 'number of fds', len(table), process.num_fds())
    files = {fd.fd: reader.get(SavedFile, fd.file_id) for fd in table}
    # psutil's open_files are the regular files that have a name
    for view in process.open_files():
        found = files[view.fd]
        yield from compare(who, f'fd {view.fd}', (found.kind, found.link, found.position, found.flags & ~os.O_CLOEXEC),
                           ('path' if view.flags & os.O_PATH else 'regular', view.path, view.position,
                            view.flags & ~os.O_CLOEXEC))
    for number, found in files.items():
        at = os.stat(f'/proc/{task.vpid}/fd/{number}')  # noqa: PTH116
        kinds = {stat.S_IFREG: {'regular', 'memfd', 'mqueue', 'namespace', 'shmem'}, stat.S_IFDIR: {'directory'},
                 stat.S_IFCHR: {'chardev', 'tty'},
                 stat.S_IFIFO: {'pipe', 'fifo'}}
        expected = {'path'} if found.flags & os.O_PATH else kinds.get(stat.S_IFMT(at.st_mode), {found.kind})
        if found.kind not in expected:
            yield f'{who}: fd {number} is of kind {found.kind} and mode {at.st_mode:#o}'


def _of_mappings(reader: ImageReader, task: ImageTask, process: psutil.Process) -> Iterator[str]:
    memory = reader.memory(task.record.mm_id)
    mine = [(f'{vma.start:08x}-{vma.end:08x}', ''.join(
        [letter if vma.protection >> bit & 1 else '-' for bit, letter in enumerate('rwx')]) + 'ps'[vma.flags & 1])
        for vma in memory.vmas]
    yield from compare(f'psutil {task.vpid}', 'mappings', mine,
                       [(view.addr, view.perms) for view in process.memory_maps(grouped=False)])


# ---------------------------------------------------------------- memory

def of_memory(reader: ImageReader) -> Iterator[str]:
    """Every byte of private memory, through /proc/PID/mem. What no run has is zero, or as in the file."""
    for mm_id, task in {task.record.mm_id: task for task in alive(reader)}.items():
        memory = reader.memory(mm_id)
        # struct rseq: the kernel writes there which CPU the thread runs on
        moving = [(at.rseq, at.rseq + 32) for at in reader.every(ThreadPointers) if at.rseq]
        with open(f'/proc/{task.vpid}/mem', 'rb', buffering=0) as mem:  # noqa: PTH123
            for start, end in [*_plain(memory), *((run.start, run.start + run.pages * PAGE) for run in memory.runs)]:
                ours, theirs = (_blanked(data, start, moving) for data in (
                    reader.read_memory(memory, start, end - start), os.pread(mem.fileno(), end - start, start)))
                if ours != theirs:
                    yield f'mem {task.vpid}: {start:x}-{end:x} differs'


def _plain(memory: Memory) -> Iterator[tuple[int, int]]:
    """Anonymous mappings in which no guard faults, but for those that the kernel may drop, which no image has."""
    for vma in memory.vmas:
        if vma.kind in (ANON, HEAP, STACK) and 'dp' not in vma.vm_flags.split() and not any(
                guard.start < vma.end and vma.start < guard.end for guard in memory.guards):
            yield vma.start, vma.end


def _blanked(data: bytes, start: int, moving: list[tuple[int, int]]) -> bytes:
    blank = bytearray(data)
    for low, high in moving:
        if start <= low and high <= start + len(data):
            blank[low - start:high - start] = bytes(high - low)
    return bytes(blank)


def of_shared_memory(reader: ImageReader) -> Iterator[str]:
    """Shared objects through any process that maps them, by /proc/PID/mem."""
    users = {task.record.mm_id: task.vpid for task in alive(reader)}
    for mm_id, pid in users.items():
        for vma in reader.memory(mm_id).vmas:
            if vma.kind != SHARED_MEMORY or not vma.protection & 1 or vma.flags & MAP_PRIVATE:
                continue
            size = min(vma.end - vma.start, reader.get(SharedMemory, vma.object).size - vma.offset)
            content = bytearray(size)
            for run in reader.shared_runs(vma.object):
                low, high = max(run.start, vma.offset), min(run.start + run.pages * PAGE, vma.offset + size)
                if low < high:
                    view = memoryview(content)[low - vma.offset:high - vma.offset]
                    reader.pread_into(view, run.part, run.offset + low - run.start)
            with open(f'/proc/{pid}/mem', 'rb', buffering=0) as mem:  # noqa: PTH123
                if os.pread(mem.fileno(), size, vma.start) != content:
                    yield f'mem {pid}: shared {vma.start:x}-{vma.end:x} differs'


# ---------------------------------------------------------------- gdb

def gdb(*args: str | Path, commands: tuple[str, ...]) -> str:
    options = [part for command in ('set width 0', 'set style enabled off', *commands) for part in ('-ex', command)]
    return tool('gdb', '-nx', '-batch', *args, *options)


def of_gdb(reader: ImageReader, directory: Path) -> Iterator[str]:
    """All registers of all threads: gdb on an exported core against gdb on the live process."""
    for leader in exportable(reader):
        core = directory / f'core.{leader}'
        with core.open('wb') as out:
            write_core(reader, leader, out)
        commands = ('thread apply all -ascending info all-registers',)
        program = Path(f'/proc/{leader}/exe').readlink()
        ours, theirs = (_registers(gdb(program, *source, commands=commands))
                        for source in ((core,), ('-p', str(leader))))
        theirs = {tid: theirs[tid] for tid in own_threads(leader, theirs)}
        yield from compare(f'gdb {leader}', 'threads', sorted(ours), sorted(theirs))
        for tid in ours.keys() & theirs.keys():
            for name in ours[tid].keys() | theirs[tid].keys():
                yield from compare(f'gdb {tid}', name, ours[tid].get(name), theirs[tid].get(name))


def _registers(said: str) -> dict[int, dict[str, str]]:
    """By thread."""
    found = {}
    for part in re.split(r'^Thread ', said, flags=re.MULTILINE)[1:]:
        tid = re.search(r'LWP (\d+)', part)
        assert tid is not None
        rows = [line.split() for line in part.splitlines()[1:] if line.strip()]
        found[int(tid[1])] = {row[0]: ' '.join(row[1:]) for row in rows if REGISTER.fullmatch(row[0])
                              and not LEFT_OUT.fullmatch(row[0])}
    return found
