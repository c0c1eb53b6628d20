# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check the resources for the tree: memory, disk, pipes, pids for its tasks, and a user's limits on these."""

import os
from collections import Counter
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.reader import ImageReader
from ckptd.image.records import OF_SHARED_MEMORY, PAGE, Limits, PageRuns, SavedFile, Vma
from ckptd.kernel.cgroup import Cgroup
from ckptd.kernel.creds import CAP_SYS_ADMIN, CAP_SYS_RESOURCE
from ckptd.kernel.pidfd import held
from ckptd.kernel.procfs import read_file
from ckptd.kernel.status import read_status
from ckptd.kernel.task import RLIM_INFINITY, pids, read_cgroup2, read_limits
from ckptd.objects.files.base import Needs
from ckptd.objects.files.deleted import home_of
from ckptd.objects.mappings.registry import needs
from ckptd.objects.verify import decode
from ckptd.restore.checks.context import CheckContext, about
from ckptd.restore.cow_sharing import CowSharing
from ckptd.restore.plan import Plan

_STRICT = 2                 # vm.overcommit_memory: reserved memory counts (proc_sys_vm(5))
_PIPES = '/proc/sys/fs/pipe-'
_LEAST_PIPE = 2             # pages, PIPE_MIN_DEF_BUFFERS in fs/pipe.c
_NPROC = 6                  # RLIMIT_NPROC, <asm-generic/resource.h>
_SEED = 1                   # the first stub, which makes all others and ends


def check(context: CheckContext) -> Iterator[Finding]:
    files = _files(context)
    yield from _memory(context, files)
    yield from _disk(context, files)
    yield from _pipes(context, files)
    yield from _tasks(context)


def _files(context: CheckContext) -> list[Needs]:
    """List the needs of open and mapped files that are made again, each once."""
    found: dict[Hashable, Needs] = {}
    for one in _every_file(context):
        if one is not None:
            known = found.get(one.key, one)
            found[one.key] = Needs(one.key, max(known.memory, one.memory), max(known.pipe, one.pipe),
                                   max(known.disk, one.disk), known.path)
    return list(found.values())


def _every_file(context: CheckContext) -> Iterator[Needs | None]:
    for saved in context.reader.every(SavedFile):
        with suppress(ImageDamaged):        # reported by checks.objects
            kind, record = decode(saved, context.lookup.kinds)
            yield kind.needs(record, saved)
    yield from needs(context.reader, context.lookup)


# ---------------------------------------------------------------- memory

def bytes_to_read(reader: ImageReader) -> int:
    """Return the bytes of pages, counting once those that several address spaces share. Memory that is only reserved
    has no pages."""
    ranges = sorted((run.part, run.offset, run.offset + run.pages * PAGE) for chunk in reader.every(PageRuns)
                    for run in chunk.runs)
    total, last, done = 0, -1, 0
    for part, start, end in ranges:
        done = done if part == last else 0
        total += max(0, end - max(start, done))
        last, done = part, max(end, done)
    return total


def parse_meminfo(data: bytes) -> dict[str, int]:
    """Parse /proc/meminfo into bytes by name (proc_meminfo(5))."""
    found = {}
    for line in data.decode().splitlines():
        name, _, value = line.partition(':')
        number, *unit = value.split()
        found[name] = int(number) * (1024 if unit == ['kB'] else 1)
    return found


def most_to_fill(reader: ImageReader, files: Iterable[Needs]) -> int:
    """Return the bytes of memory that a restart fills at most: every page as often as a page run names it, and the
    content of files in memory. Memory that is only reserved takes none. An image may name one piece of its data any
    number of times."""
    runs = sum(run.pages for chunk in reader.every(PageRuns) for run in chunk.runs)
    return runs * PAGE + sum(one.memory for one in files)


def inherited_bytes(reader: ImageReader, plan: Plan) -> int:
    """Return the bytes of these that a forked process inherits with its maker's memory."""
    total = 0
    for mm_id in plan.users('mm_id'):
        if origin := plan.origins.get(mm_id):
            total += sum(end - start for start, end in CowSharing(reader.memory(origin), reader.memory(mm_id)).same)
    return total


def _memory(context: CheckContext, files: Sequence[Needs]) -> Iterator[Finding]:
    needed, info = most_to_fill(context.reader, files), parse_meminfo(read_file('/proc/meminfo'))
    groups = [(group, left) for group in _above(context.home) if (left := _left(group)) is not None]
    free, swap = info['MemAvailable'], info['SwapFree']
    what = ''
    if needed > min([free, *(left for _, left in groups)]):
        # this takes time, so find out only now
        needed -= inherited_bytes(context.reader, context.plan)
        what = f'the tree has {needed:,} bytes of memory, {bytes_to_read(context.reader):,} of them in the image'
    if needed > free + swap:
        yield about(0, 'memory', 'ENOMEM', f'{what}, and {free + swap:,} are left, swap included', 'free memory, or '
                    'add swap')
    elif needed > free:
        yield about(0, 'memory', 'ENOMEM', f'{what}, and without swapping {free:,} are left', 'free memory, or it '
                    'is going to be slow', 'warning')
    if _number('/proc/sys/vm/overcommit_memory') == _STRICT:
        reserved = sum(vma.end - vma.start for vma in context.reader.every(Vma) if 'ac' in vma.vm_flags.split())
        if reserved > (left := info['CommitLimit'] - info['Committed_AS']):
            yield about(0, 'memory', 'ENOMEM', f'the tree reserves {reserved:,} bytes, and {left:,} may be reserved',
                        'set the sysctl vm.overcommit_memory to 0, or add swap')
    for group, left in groups:
        if needed > left:
            yield about(0, 'memory', 'ENOMEM', f'{what}, and the cgroup {group.name} has {max(left, 0):,} left',
                        'raise its memory.max (systemd: MemoryMax=), or restore with another --cgroup')
    yield from _own_memory(context, files, {group.path for group, _ in groups})


def _own_memory(context: CheckContext, files: Sequence[Needs], known: Container[object]) -> Iterator[Finding]:
    """Check memory for shared objects. We fill them, so they are charged to our cgroup
    (Documentation/admin-guide/cgroup-v2.rst, "Memory Ownership")."""
    runs = [run for chunk in context.reader.every(PageRuns) if chunk.owner_kind == OF_SHARED_MEMORY
            for run in chunk.runs]
    needed = sum(run.pages for run in runs) * PAGE + sum(one.memory for one in files)
    for group in _above(read_cgroup2(os.getpid())):
        if group.path not in known and (left := _left(group)) is not None and needed > left:
            yield about(0, 'memory', 'ENOMEM', f'its shared objects have {needed:,} bytes, and the cgroup '
                        f'{group.name} of ckptd has {max(left, 0):,} left', 'raise its memory.max (systemd: '
                        'MemoryMax=)')


def _left(group: Cgroup) -> int | None:
    """Return the bytes that may still be charged to a cgroup; None without a limit."""
    limit = _limit(group, 'memory.max')
    return None if limit is None else limit - _used(group)


def _used(group: Cgroup) -> int:
    """Return the bytes charged to a cgroup, without the page cache that it can release."""
    with suppress(OSError):
        stat = dict(line.split() for line in read_file(f'{group.path}/memory.stat').decode().splitlines())
        return _number(f'{group.path}/memory.current') - int(stat['active_file']) - int(stat['inactive_file'])
    return 0


def _number(path: str) -> int:
    return int(read_file(path))


def _limit(group: Cgroup, file: str) -> int | None:
    """Return the limit; None if there is none, or no such controller."""
    with suppress(OSError, ValueError):     # 'max' is not a number
        return _number(f'{group.path}/{file}')
    return None


def _above(home: str) -> list[Cgroup]:
    """Return a cgroup and all above it, without those that do not exist yet."""
    with suppress(FileNotFoundError):
        group: Cgroup | None = Cgroup.named(home)
        found = []
        while group is not None:
            found += [group] if group.exists else []
            group = group.parent or (Cgroup(group.path.parent) if not group.exists else None)
        return found
    return []


# ---------------------------------------------------------------- files

def _disk(context: CheckContext, files: Iterable[Needs]) -> Iterator[Finding]:
    """Check space for deleted files, which are made in a directory with their content."""
    needed: Counter[str] = Counter()
    for one in files:
        if one.disk:
            needed[home_of(one.path, context.lookup)] += one.disk
    for home, size in needed.items():
        with suppress(OSError):     # without a directory it is refused for that reason
            fd = context.lookup.open(home, os.O_PATH | os.O_DIRECTORY)
            try:
                at = os.fstatvfs(fd)
            finally:
                os.close(fd)
            free = (at.f_bavail if context.lookup.uid else at.f_bfree) * at.f_frsize
            if size > free:
                yield about(0, 'deleted files', 'ENOSPC', f'its deleted files have {size:,} bytes, and {home} has '
                            f'{free:,} left for them', 'free space there')


def _pipes(context: CheckContext, files: Iterable[Needs]) -> Iterator[Finding]:
    """Check the pipes of a user by the rules of fs/pipe.c: pipes of two pages are always available, larger ones up to
    the soft limit in all, and none beyond the hard one."""
    if context.lookup.capable(CAP_SYS_RESOURCE) or context.lookup.capable(CAP_SYS_ADMIN):
        return
    sizes = [one.pipe for one in files if one.pipe]
    largest, pages = _number(f'{_PIPES}max-size'), [-(-size // PAGE) for size in sizes]
    if (most := max(sizes, default=0)) > largest:
        yield about(0, 'pipes', 'EPERM', f'has a pipe of {most:,} bytes, and a user may make one of {largest:,}',
                    'raise the sysctl fs.pipe-max-size, or restore it as root')
    for name, needed in (('user-pages-soft', sum(one for one in pages if one > _LEAST_PIPE)),
                         ('user-pages-hard', sum(pages))):
        limit = _number(f'{_PIPES}{name}')
        if 0 < limit < needed:
            yield about(0, 'pipes', 'EPERM', f'its pipes have {needed:,} pages, and a user may have {limit:,}',
                        f'raise the sysctl fs.pipe-{name}, or restore it as root')


# ---------------------------------------------------------------- tasks

def _tasks(context: CheckContext) -> Iterator[Finding]:
    needed = max(len(context.plan.tasks), len(context.plan.numbers)) + _SEED
    running = int(read_file('/proc/loadavg').split()[3].partition(b'/')[2])
    for name in ('threads-max', 'pid_max'):
        most = _number(f'/proc/sys/kernel/{name}')
        if running + needed > most:
            yield about(0, 'tasks', 'EAGAIN', f'{needed:,} more tasks are needed, {running:,} run and {most:,} may',
                        f'raise the sysctl kernel.{name}')
    yield from _numbers(context.plan.numbers)
    for group in _above(context.home):
        limit = _limit(group, 'pids.max')
        if limit is not None and needed > (left := limit - (_limit(group, 'pids.current') or 0)):
            yield about(0, 'tasks', 'EAGAIN', f'{needed:,} more tasks are needed, and the cgroup {group.name} takes '
                        f'{max(left, 0):,}', 'raise its pids.max (systemd: TasksMax=), or restore with another '
                        '--cgroup')
    yield from _own_limit(context, needed, running)


def _own_limit(context: CheckContext, needed: int, running: int) -> Iterator[Finding]:
    """Check RLIMIT_NPROC, which counts all tasks of a uid (getrlimit(2)). It is ours or, if we are root, that of the
    caller."""
    uid = os.getuid() or context.request.caller.uid
    free = (context.may(CAP_SYS_RESOURCE) or context.may(CAP_SYS_ADMIN)) if os.getuid() else (
        context.lookup.capable(CAP_SYS_RESOURCE) or context.lookup.capable(CAP_SYS_ADMIN))
    if free or not uid:
        return
    soft = _limit_of_tasks(context)
    # counting those of one uid takes time, while the number for the machine is known
    if needed + running > soft and (own := _tasks_of(uid)) + needed > soft:
        yield about(0, 'RLIMIT_NPROC', 'EAGAIN', f'{needed:,} more tasks are needed, uid {uid} has {own:,} and may '
                    f'have {soft:,}', 'raise the limit (ulimit -u)')


def _limit_of_tasks(context: CheckContext) -> int:
    """Return the soft limit. The caller of a job that outlives them may be gone. Then it is the limit that the tree
    had, which an imported image may have made up, see checks.imported."""
    caller = context.request.caller
    with suppress(ProcessLookupError, FileNotFoundError):
        if os.getuid():
            return read_limits(os.getpid())[_NPROC][0]
        with held(caller.pid, caller.start_time, caller.uid):
            return read_limits(caller.pid)[_NPROC][0]
    return min((context.reader.get(Limits, vpid).limits[_NPROC].soft for vpid in context.leaders),
               default=RLIM_INFINITY)


def _numbers(numbers: Iterable[int]) -> Iterator[Finding]:
    """Check that the pid of each task is below pid_max (kernel/pid.c, alloc_pid)."""
    most, highest = _number('/proc/sys/kernel/pid_max'), max(numbers, default=0)
    if highest >= most:
        yield about(highest, f'pid {highest}', 'EINVAL', f'this machine has numbers below {most:,} only',
                    f'raise the sysctl kernel.pid_max above {highest}')


def _tasks_of(uid: int) -> int:
    count = 0
    for pid in pids():
        with suppress(OSError):
            if read_status(pid).uids[0] == uid:     # the owner of /proc/PID is root for a process that is not dumpable
                count += os.stat(f'/proc/{pid}/task').st_nlink - 2  # noqa: PTH116
    return count
