# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl demo: checkpoint a real tree while it counts, kill it, look at the image in several ways, and restore the
tree."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.cli import demo_tree
from ckptd.cli.checkpoint import summary
from ckptd.cli.doctor import report_missing
from ckptd.cli.export import export_to
from ckptd.cli.follow import JobCall, run_job
from ckptd.cli.output import Output
from ckptd.cli.program import run_program
from ckptd.cli.progress import ProgressBar, ProgressLines
from ckptd.cli.quantities import format_bytes, format_count, format_timespan
from ckptd.cli.session import LONG, DaemonProxy, Session
from ckptd.cli.standalone import adopt_orphans, end_with_parent, environment
from ckptd.cli.tree import draw_tree
from ckptd.errors import CkptError, Refused, finding_from
from ckptd.target import ProcessTarget

START_TIMEOUT = 20.0
GDB_TIMEOUT = 60.0
BACKTRACE_FRAMES = 5      # of each thread
WIDTH = 118                # without a terminal


@dataclass(slots=True)
class Demo:
    """One run of the demo. facts: the object that --json prints at the end."""
    out: Output
    daemon: DaemonProxy
    directory: Path
    pid: int
    freeze: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return str(ProcessTarget(self.pid))

    async def check(self) -> None:
        self.title('Check: would a checkpoint of it succeed?', f'ckptctl check {self.pid}')
        rows = await self.daemon.manager('Check', 'sa{sv}', self.target, {}, seconds=LONG)
        findings = [finding_from(row) for row in rows]
        self.out.refusals(findings)
        if refusals := [finding for finding in findings if finding.severity == 'refusal']:
            raise Refused.because(refusals, 'check')
        self.out.line('yes: there is no refusal', 'green')

    async def checkpoint(self) -> str:
        self.title('Checkpoint: freeze, scan, check, write; and kill', f'ckptctl checkpoint {self.pid} --kill')
        job_call = JobCall('Checkpoint', self.target, {'freeze': self.freeze, 'after': 'kill'})
        with self._progress() as progress:
            result = await run_job(self.daemon, job_call, progress)
        self.facts |= {**result, 'counters_before': demo_tree.read_counters(self.directory)}
        self.out.line(f'image {result["image"]}: {summary(result)}', 'green')
        self.out.line(f'what froze the tree: {result["freeze_mode"]}')
        self.out.line('every process of it is dead now; its counts were in their memory')
        return str(result['image'])

    async def tree(self, image: str) -> dict[str, Any]:
        """Draw the image. Return the row of a process whose backtrace is shown."""
        self.title('Tree: the processes in the image', f'ckptctl tree {image}')
        rows = await self.daemon.image(image, 'Tree', seconds=LONG)
        draw_tree(self.out, rows)
        return next((row for row in rows if row['comm'] == 'counter'), rows[0])

    async def statistics(self, image: str) -> None:
        self.title('Statistics: where the time went', f'ckptctl show {image}')
        properties = await self.daemon.image_properties(image)
        for name, value in properties['Statistics'].items():
            shown = format_timespan(value) if name.endswith('_time') else format_count(value, 'page')
            self.out.line(f'{name:>15}  {shown}')
        self.out.line(f'{"size":>15}  {format_bytes(properties["Size"])}')
        self.facts['size'] = properties['Size']

    async def verify(self, image: str) -> None:
        self.title('Verify: is the image complete and unaltered?', f'ckptctl verify {image}')
        damages = await self.daemon.manager('VerifyImage', 's', image, seconds=LONG)
        self.facts['damages'] = damages
        for damage in damages:
            self.out.line(damage, 'red')
        if damages:
            raise CkptError(f'the image just written has {format_count(len(damages), "damage")}')
        self.out.line('every part matches its digest, every record is valid', 'green')

    async def export(self, image: str, row: dict[str, Any]) -> None:
        """Write cores of all processes and show gdb's view of one."""
        cores = self.directory / 'cores'
        self.title('Export: cores for a debugger', f'ckptctl export --format core {image} cores')
        written = await export_to(self.daemon, image, cores)
        self.facts['cores'] = [name for name, _ in written]
        for name, size in written:
            self.out.line(f'{name}  {format_bytes(size)}')
        core = cores / f'core.{row.get("vtid") or row["tid"]}'
        self.facts['backtrace'] = await self._backtrace(core)

    async def _backtrace(self, core: Path) -> list[str]:
        gdb = shutil.which('gdb')
        program = str(await asyncio.to_thread(Path(sys.executable).resolve))
        self.title(f'Backtrace of {core.name}, from the image alone', f'gdb {program} {core.name}')
        if gdb is None:
            self.out.line('gdb is not installed (apt-get install gdb); it would show the stack of every thread here')
            return []
        width = shutil.get_terminal_size((WIDTH, 0)).columns
        said = await _run_gdb(gdb, program, core)
        first = next((index for index, line in enumerate(said) if line.startswith('Thread ')), len(said))
        lines = [line for line in said[first:] if line.startswith(('#', 'Thread '))]
        for line in lines:
            self.out.line(line if len(line) <= width else f'{line[:width - 1]}…')
        return lines

    async def restart(self, image: str) -> int:
        """Restore the tree. Return its exit status after it was told to end."""
        self.title('Restart: the same pids, memory, files and threads', f'ckptctl restore {image} --wait')
        root: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        with self._progress() as progress:
            attended = asyncio.create_task(run_job(self.daemon, JobCall('Restore', image, {'wait': True}), progress,
                                                   lambda pid: None if root.done() else root.set_result(pid)))
            # the first of them is the root's start, or an earlier failure
            either: set[asyncio.Future[Any]] = {root, attended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not root.done():
            await attended
            raise CkptError('the tree ended before its root was seen')
        self.out.line(f'it runs; its root is process {root.result()}', 'green')
        try:
            await self._still_counts()
        finally:
            os.kill(root.result(), signal.SIGTERM)
        result = await attended
        return os.waitstatus_to_exitcode(result['exit_status'])

    async def _still_counts(self) -> None:
        before = self.facts['counters_before']
        async with asyncio.timeout(START_TIMEOUT):
            # other processes write this memory, and no event reports that
            while not _all_grew(before, demo_tree.read_counters(self.directory)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        after = demo_tree.read_counters(self.directory)
        for name, then, now in zip(demo_tree.SLOTS, before, after, strict=True):
            self.out.line(f'{name:>20}  {then:>6} when it was killed, {now:>6} now')
        self.facts['counters_after'] = after

    def title(self, text: str, command: str) -> None:
        self.out.line()
        self.out.line(text, 'bold cyan')
        if command:
            self.out.line(f'$ {command}', 'dim')

    def _progress(self) -> ProgressBar | ProgressLines:
        return ProgressBar(self.out, self.target, keep=True) if self.out.stderr.isatty() else ProgressLines(self.out)


async def demo(session: Session) -> int:
    """Run the demo in a temporary directory, which is removed unless --keep is given."""
    out = session.out
    # The killed tasks keep their pids until they are waited for. Not every init does that at once, so do it here.
    adopt_orphans()
    directory = Path(tempfile.mkdtemp(prefix='ckptd-demo-'))
    out.line('A tree of counting processes, with threads, a pipe and shared memory; a private bus and daemon.', 'bold')
    try:
        async with _counting_tree(directory) as tree, session.private_daemon(directory / 'spool') as daemon:
            run = Demo(out, daemon, directory, tree.pid, session.args.freeze)
            out.line(f'{run.target} supervises four processes, two of them with two threads more.')
            status = await _steps(run, tree)
        run.facts['tree_exit_status'] = status
        _conclude(out, run.facts, status)
        return 0 if status == 0 else 1
    except CkptError:
        await report_missing(out)
        raise
    finally:
        if session.args.keep:
            out.note(f'kept: {directory}')
        else:
            await asyncio.to_thread(shutil.rmtree, directory)


def _all_grew(before: list[int], now: list[int]) -> bool:
    return all(later > earlier for later, earlier in zip(now, before, strict=True))


async def _wait_all(tree: asyncio.subprocess.Process) -> None:
    """Wait for all processes of the killed tree: the root is our child, and its descendants have become our
    children."""
    await tree.wait()
    await asyncio.to_thread(_reap, tree.pid)


def _reap(group: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-group, 0)


async def _steps(run: Demo, tree: asyncio.subprocess.Process) -> int:
    await run.check()
    image = await run.checkpoint()
    await _wait_all(tree)
    row = await run.tree(image)
    await run.statistics(image)
    await run.verify(image)
    await run.export(image, row)
    return await run.restart(image)


def _conclude(out: Output, facts: dict[str, Any], status: int | None) -> None:
    if out.json:
        out.document(facts)
    out.line()
    if status == 0:
        out.line('The tree was told to end, found all its counts correct, and exited with status 0.',
                 'bold green')
    else:
        out.line(f'The tree ended with status {status}: it did not continue correctly.', 'bold red')


@contextlib.asynccontextmanager
async def _counting_tree(directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run demo_tree until it is ready; end it and wait for it afterwards. It has a session of its own, so Ctrl-C does
    not reach it."""
    ready = directory / demo_tree.READY
    os.mkfifo(ready)
    with (directory / 'tree.log').open('wb') as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, '-P', '-m', 'ckptd.cli.demo_tree', str(directory), env=environment(),
            start_new_session=True, preexec_fn=end_with_parent, stdin=asyncio.subprocess.DEVNULL,
            stdout=log, stderr=log)
    try:
        await _wait_ready(process, ready, directory / 'tree.log')
        yield process
    finally:
        await _end(process)


async def _wait_ready(process: asyncio.subprocess.Process, ready: Path, log: Path) -> None:
    """Wait until the FIFO is readable, which means that the tree is complete. If the tree ends instead, its log tells
    why."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    fifo = os.open(ready, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    loop.add_reader(fifo, _resolve, readable)
    ended = asyncio.ensure_future(process.wait())
    either: set[asyncio.Future[Any]] = {readable, ended}
    try:
        await asyncio.wait(either, timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(fifo)
        os.close(fifo)
        ended.cancel()
    if not readable.done():
        said = await asyncio.to_thread(log.read_text)
        raise CkptError(f'the demo\'s tree did not start: {said.strip() or "it printed no error"}', hint='')


def _resolve(future: 'asyncio.Future[None]') -> None:
    if not future.done():
        future.set_result(None)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(START_TIMEOUT):
            await process.wait()
    except TimeoutError:
        os.killpg(process.pid, 9)
        await process.wait()


async def _run_gdb(gdb: str, program: str, core: Path) -> list[str]:
    """Return gdb's backtrace of all threads. gdb reads no initialization files, asks no questions and downloads
    nothing."""
    done = await run_program(
        gdb, '-nx', '-batch', '-iex', 'set debuginfod enabled off', '-ex', 'set print frame-arguments none',
        '-ex', 'set filename-display basename', '-ex', f'thread apply all bt {BACKTRACE_FRAMES}', program, str(core),
        seconds=GDB_TIMEOUT, env=environment())
    return done.out.splitlines()
