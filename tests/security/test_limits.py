# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a restored tree may use up: no more than its user may, whatever the image says."""

import dataclasses
import fcntl
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.image.records import MEMFD, OF_MM, OF_SHARED_MEMORY, PAGE, Limit, PageRun
from ckptd.kernel.pidfd import pidfd_getfd
from tests.lib.bus import Served
from tests.lib.imgedit import ImageStream
from tests.lib.victim import session_members
from tests.security.attacker import Attacker, pidfd_of, refused
from tests.worker.faulty import Gate

# ---------------------------------------------------------------- the lowest address

PLACE = 0x10000000
MAPPED = f"""
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(ctypes.c_void_p({PLACE}), {PAGE}, 3, 0x32, -1, 0)
ctypes.memset(page, 65, {PAGE})
rest()
"""


def moved(image: ImageStream, start: int, to: int) -> None:
    """The mapping of one page that starts here starts there."""
    assert image.alter('Vma', lambda vma: vma.start == start, start=to, end=to + PAGE) == 1
    image.sort('Vma', lambda vma: (vma.mm_id, vma.start))

    def move(chunk: Any) -> Any:
        runs = (dataclasses.replace(run, start=to) if run.start == start else run for run in chunk.runs)
        return dataclasses.replace(chunk, runs=tuple(sorted(runs, key=lambda run: run.start)))
    assert image.change('PageRuns', move) == 1


@pytest.mark.needs('mmap-min-addr')
def test_no_mapping_below_the_lowest_address(served: Served, attacker: Attacker) -> None:
    """A null pointer of the kernel's would lead there: vm.mmap_min_addr."""
    image = attacker.take(attacker.start(MAPPED))
    moved(image, PLACE, 0)
    outcome = attacker.restore(image)
    if not refused(outcome):
        first = Path(f'/proc/{outcome.root}/maps').read_text().partition('-')[0]
        assert int(first, 16) >= int(Path('/proc/sys/vm/mmap_min_addr').read_text())


# ---------------------------------------------------------------- processes

FORKING = """
for _ in range(20):
    if not os.fork():
        not_the_one_to_report()
        while True:
            time.sleep(1000)
rest()
"""
NPROC = 8


@pytest.mark.parametrize('imported', [True, False], ids=['imported', 'own'])
def test_no_more_processes_than_the_asker_may_have(served: Served, thrifty: Attacker, imported: bool) -> None:
    program = thrifty.start(FORKING)
    image: ImageStream | str = thrifty.take(program) if imported else thrifty.checkpoint(program)
    if isinstance(image, ImageStream):
        # or it would be refused for a limit above the asker's
        low = Limit(NPROC, NPROC)
        assert image.change('Limits', lambda one: dataclasses.replace(one, limits=tuple(
            low if number == resource.RLIMIT_NPROC else limit for number, limit in enumerate(one.limits)))) == 21
    thrifty.before.append(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (NPROC, NPROC)))
    refused(thrifty.restore(image))
    assert len(session_members(program.pid)) <= NPROC


# ---------------------------------------------------------------- memory

# the first MiB of a region is there, the rest is not
PRIVATE = """
region = mmap.mmap(-1, {0}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)    # MAP_NORESERVE
region.write(b'A' * (1 << 20))
rest()
"""
SHARED = """
fd = os.memfd_create('region')
os.ftruncate(fd, 1 << 20)
os.write(fd, b'A' * (1 << 20))
rest()
"""


def meminfo(name: str) -> int:
    """Bytes, proc_meminfo(5)."""
    [line] = [line for line in Path('/proc/meminfo').read_text().splitlines() if line.startswith(f'{name}:')]
    return int(line.split()[1]) << 10


def repeated(run: PageRun, size: int) -> tuple[PageRun, ...]:
    """Runs over `size` bytes from where one starts, all of the same pages of the image."""
    step = run.pages * PAGE
    return tuple(PageRun(run.start + at, run.pages, run.part, run.offset) for at in range(0, size - step + 1, step))


def of_one_piece(image: ImageStream, owner_kind: int, size: int) -> int:
    """Have the largest run of pages of such objects stand for `size` bytes; the object's number."""
    chunks = [chunk for chunk in image.every('PageRuns') if chunk.owner_kind == owner_kind]
    owner, largest = max(((chunk.owner, run) for chunk in chunks for run in chunk.runs), key=lambda one: one[1].pages)
    assert largest.pages * PAGE >= 1 << 20
    assert image.change('PageRuns', lambda chunk: dataclasses.replace(chunk, runs=tuple(
        new for run in chunk.runs for new in (repeated(run, size) if run == largest else (run,))))) == 1
    return int(owner)


@pytest.mark.parametrize('kind', ['shared', 'private'])
def test_memory_is_counted_as_often_as_it_is_there(served: Served, attacker: Attacker, kind: str) -> None:
    """An image of a few MiB whose tree has more memory than the machine: nothing is restored here, but looked at."""
    size = 2 * (meminfo('MemTotal') + meminfo('SwapTotal')) >> 20 << 20
    image = attacker.take(attacker.start(SHARED if kind == 'shared' else PRIVATE.format(size)))
    if kind == 'shared':
        shm_id = of_one_piece(image, OF_SHARED_MEMORY, size)
        assert image.alter('SharedMemory', lambda one: one.shm_id == shm_id and one.kind == MEMFD, size=size) == 1
        assert image.alter_kind('memfd', size=size) == 1
    else:
        of_one_piece(image, OF_MM, size)
    assert len(image.dump()) < size >> 6
    rows = [row for row in attacker.check_restore(image) if row.severity == 'refusal']
    assert 'ENOMEM' in {row.errno for row in rows}, rows


# ---------------------------------------------------------------- pipes

PIPES = """
pipes = [os.pipe() for _ in range({0})]
rest()
"""
MOST = 1 << 20      # fs.pipe-max-size


def pipe_sizes(pid: int) -> dict[int, int]:
    """Capacities of the pipes that a process has open, by inode."""
    found = {}
    with pidfd_of(pid) as pidfd:
        for path in Path(f'/proc/{pid}/fd').iterdir():
            if match := re.fullmatch(r'pipe:\[(\d+)\]', str(path.readlink())):
                fd = pidfd_getfd(pidfd, int(path.name))
                found[int(match[1])] = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
                os.close(fd)
    return found


@pytest.mark.needs('pipe-user-pages-soft')
def test_no_more_pipe_buffers_than_a_user_may_have(served: Served, thrifty: Attacker) -> None:
    """fs.pipe-user-pages-soft, pipe(7)."""
    soft = int(Path('/proc/sys/fs/pipe-user-pages-soft').read_text())
    count = soft * PAGE // MOST + 16
    image = thrifty.take(thrifty.start(PIPES.format(count)))
    assert image.alter_kind('pipe', capacity=MOST) == 2 * count
    outcome = thrifty.restore(image)
    if not refused(outcome):
        assert sum(pipe_sizes(outcome.root).values()) <= soft * PAGE


# ---------------------------------------------------------------- timers that wake a machine that sleeps

# CLOCK_BOOTTIME (7) and its twin with an alarm (9), <linux/time.h>
TIMERFD = """
fd = libc.timerfd_create(7, 0)
libc.timerfd_settime(fd, 0, struct.pack('<4q', 0, 0, 1000, 0), None)
rest()
"""
TIMER = """
number = ctypes.c_int()
libc.timer_create(7, struct.pack('<Qii48x', 0, 10, 0), ctypes.byref(number))
libc.timer_settime(ctypes.c_void_p(number.value), 0, struct.pack('<4q', 0, 0, 1000, 0), None)
rest()
"""
ALARM = 9


def clocks_of(pid: int) -> set[int]:
    """Of the timers of a process and of its timerfds."""
    texts = [path.read_text() for path in (*Path(f'/proc/{pid}/fdinfo').iterdir(), Path(f'/proc/{pid}/timers'))]
    return {int(number) for text in texts for number in re.findall(r'^(?:clockid|ClockID): (\d+)$', text, re.MULTILINE)}


def test_no_timerfd_wakes_the_machine(served: Served, attacker: Attacker) -> None:
    """That takes CAP_WAKE_ALARM, timerfd_create(2)."""
    program = attacker.start(TIMERFD)
    assert clocks_of(program.pid) == {7}
    image = attacker.take(program)
    assert image.alter_kind('timerfd', clock=ALARM) == 1
    outcome = attacker.restore(image)
    if not refused(outcome):
        assert ALARM not in clocks_of(outcome.root)


def test_no_timer_wakes_the_machine(served: Served, attacker: Attacker) -> None:
    """The same of timer_create(2), which knows that clock only where there is a clock that wakes the machine."""
    program = attacker.start(TIMER)
    assert clocks_of(program.pid) == {7}
    image = attacker.take(program)
    assert image.change('PosixTimers', lambda one: dataclasses.replace(one, timers=tuple(
        dataclasses.replace(timer, clock=ALARM) for timer in one.timers))) == 1
    outcome = attacker.restore(image)
    if not refused(outcome):
        assert ALARM not in clocks_of(outcome.root)


# ---------------------------------------------------------------- room in the spool

WRITER = """
file = open('large', 'wb+')
file.write(b'B' * 4096)
file.flush()
rest()
"""
ROOM = 24 << 20
KEEP_FREE = ROOM // 20      # KeepFree= is 5% where nobody has set it


@pytest.fixture
def small_spool(tmp_path: Path) -> Iterator[Path]:
    """A spool with little room."""
    path = tmp_path / 'small'
    path.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={ROOM},mode=700', 'ckptd-test', path], check=True)
    yield path
    subprocess.run(['umount', path], check=True)


async def test_a_rollback_leaves_the_room_that_is_to_stay_free(small_spool: Path, serve: Callable[..., Served],
                                                               attacker: Attacker, gate: Gate) -> None:
    """What a file has by now is kept until the restart is over, in the spool of all."""
    serve(spool=small_spool, env=gate.environment)
    program = attacker.start(WRITER)
    left: list[int] = []

    def look(point: str, pid: int) -> None:
        room = os.statvfs(small_spool)
        left.append(room.f_bavail * room.f_frsize)

    async with gate.open():
        image = await attacker.checkpointing(program)
        program.wait_dead()
        with (program.directory / 'large').open('ab') as file:
            file.write(b'M' * (ROOM - KEEP_FREE))
        gate.look = look
        refused(await attacker.restoring(image, changed_files='rollback'))
    assert len(left) > 1
    assert min(left) >= KEEP_FREE, f'{min(left):,} of {ROOM:,} bytes'
