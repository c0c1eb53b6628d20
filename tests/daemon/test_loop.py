# SPDX-License-Identifier: LGPL-2.1-or-later
"""No callback of the daemon's event loop keeps everybody else waiting: all are measured while clients keep it busy.

Measured is the CPU time of the loop's thread, which a busy machine does not add to.
"""

import asyncio
import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from asyncio import events
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptd import daemon
from ckptd.bus.client import connect
from ckptd.bus.names import BUS_NAME, JOB, MANAGER
from ckptd.bus.names import ROOT as ROOT_PATH
from ckptd.bus.router import MAX_CALLS
from ckptd.errors import Busy, NoSuchTarget
from ckptd.image.manifest import Manifest, Statistics, encode_manifest
from ckptd.jobs import overlap
from ckptd.jobs.images import REMOVALS
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.spool import Spool, SpooledImage
from ckptd.kernel.stat import Stat, read_stat
from tests.bench.bench_scan import build, sleeping_tree
from tests.daemon.test_api import sleeper
from tests.jobs.scripted import PLAYER
from tests.jobs.test_spool import write_image
from tests.lib.brood import Brood
from tests.lib.bus import ROOT, PrivateBus

__all__ = ['sleeper']

LIMIT = 0.050       # seconds of CPU
DEPTH = 40          # processes in a line
LISTENERS = 10
IMAGES = 2000
TASKS = 300         # of so many rows another thread marshals the answer

pytestmark = [pytest.mark.needs('root', 'dbus'), pytest.mark.timeout(300)]


def name_of(callback: Any) -> str:
    """'Router.serve in ListImages of :1.3' for the step of a task, else the name of the function."""
    owner = getattr(callback, '__self__', None)
    if isinstance(owner, asyncio.Task):
        return f'{getattr(owner.get_coro(), "__qualname__", owner)} in {owner.get_name()}'
    if isinstance(callback, partial):
        return name_of(callback.func)
    return str(getattr(callback, '__qualname__', callback))


class Watch:
    """The longest callbacks of this thread: seconds of CPU by name."""

    def __init__(self) -> None:
        self.longest: dict[str, float] = {}
        self.count = 0
        self._run = events.Handle._run

    def __enter__(self) -> 'Watch':
        watch, run = self, self._run

        def measured(handle: events.Handle) -> None:
            callback, start = getattr(handle, '_callback', None), time.thread_time()
            run(handle)
            watch.add(callback, time.thread_time() - start)

        # what pytest has loaded would make the collector's pauses longer than a daemon's are
        gc.collect()
        gc.freeze()
        events.Handle._run = measured       # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        events.Handle._run = self._run      # type: ignore[method-assign]
        gc.unfreeze()

    def add(self, callback: Any, seconds: float) -> None:
        self.count += 1
        if seconds > LIMIT / 10:
            name = name_of(callback)
            self.longest[name] = max(seconds, self.longest.get(name, 0.0))

    def reset(self) -> None:
        """What was until now does not count: nobody is served before READY=1."""
        print(f'before:\n{self.table()}')
        self.longest.clear()

    def judge(self) -> None:
        slow = {name: seconds for name, seconds in self.longest.items() if seconds > LIMIT}
        assert not slow, f'callbacks took more than {LIMIT * 1e3:.0f} ms of CPU:\n{self.table()}'

    def table(self) -> str:
        rows = sorted(self.longest.items(), key=lambda row: -row[1])[:10]
        return '\n'.join([f'{self.count} callbacks', *(f'{seconds * 1e3:7.1f} ms  {name}' for name, seconds in rows)])


@contextlib.asynccontextmanager
async def watched(watch: Watch, bus: PrivateBus, spool: Path, runtime: Path) -> AsyncIterator[None]:
    """A daemon in this very loop, that is measured from when it is ready."""
    options = daemon.parse_arguments(['--address', bus.address, '--spool', str(spool), '--runtime', str(runtime)])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f'\0ckptd-test-{os.getpid()}')
        manager.setblocking(False)
        os.environ['NOTIFY_SOCKET'] = f'@ckptd-test-{os.getpid()}'      # taken out again by the daemon
        one = daemon.Daemon(daemon.make_settings(options))
        task = asyncio.create_task(one.run())
        ready = asyncio.create_task(asyncio.get_running_loop().sock_recv(manager, 1000))
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            ready.cancel()
            await task
        assert (await ready).startswith(b'READY=1')
        watch.reset()
        try:
            yield
        finally:
            one._stop.set()
            await task
            await asyncio.get_running_loop().shutdown_default_executor()


async def busy(bus: PrivateBus, *arguments: str) -> None:
    """What busy.py does to it."""
    process = await asyncio.create_subprocess_exec(sys.executable, '-m', 'tests.daemon.busy', bus.address, *arguments,
                                                   cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


@pytest.fixture
def watch() -> Iterator[Watch]:
    with Watch() as made:
        yield made
    print(made.table())


def fill(spool: Path) -> None:
    """With images of which there are only the manifests."""
    manifest = Manifest(
        image='20260101_000000_sort_0000', created_usec=7, ckptd_version='0', kernel='6.18', boot_id='b', owner_uid=0,
        owner_gid=0, target='pid:1', root=1, command='sort', tasks=3, processes=2, freeze_mode='cgroup',
        statistics=Statistics(frozen_time=9))
    for number in range(IMAGES):
        image = f'20260101_000000_sort_{number:04x}'
        (spool / image).mkdir(mode=0o700, parents=True)
        (spool / image / 'manifest.json').write_bytes(encode_manifest(msgspec.structs.replace(manifest, image=image)))


def move(aside: Path, spool: Path) -> None:
    for image in aside.iterdir():
        image.rename(spool / image.name)


async def test_many_images(watch: Watch, private_bus: PrivateBus, spool: Path, tmp_path: Path) -> None:
    await asyncio.to_thread(fill, spool)
    async with watched(watch, private_bus, spool, tmp_path / 'run'):
        await busy(private_bus, 'images', str(IMAGES))
    watch.judge()


async def test_many_images_that_come_at_once(watch: Watch, private_bus: PrivateBus, spool: Path,
                                             tmp_path: Path) -> None:
    """As when a backup is put back: in one look hundreds are new."""
    await asyncio.to_thread(fill, aside := tmp_path / 'aside')
    async with watched(watch, private_bus, spool, tmp_path / 'run'):
        await asyncio.to_thread(move, aside, spool)
        await busy(private_bus, 'arrival', str(IMAGES))
    watch.judge()


async def test_many_images_that_go_at_once(watch: Watch, private_bus: PrivateBus, spool: Path, tmp_path: Path) -> None:
    await asyncio.to_thread(fill, spool)
    (aside := tmp_path / 'aside').mkdir()
    async with watched(watch, private_bus, spool, tmp_path / 'run'), contextlib.AsyncExitStack() as listeners:
        for _ in range(LISTENERS):
            listener = await listeners.enter_async_context(await connect(private_bus.address))
            await listener.call(BUS_NAME, ROOT_PATH, MANAGER, 'ListJobs')
        await asyncio.to_thread(move, spool, aside)
        await busy(private_bus, 'departure')
    watch.judge()


async def test_many_removals(watch: Watch, private_bus: PrivateBus, spool: Path, tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of them have threads at a time, and of what changes during a look into the spool there is one more."""
    at_work = most = looks = 0
    several, go, removed, lock = threading.Event(), threading.Event(), threading.Event(), threading.Lock()

    def remove(self: Spool, info: SpooledImage) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
            if most > 1:
                several.set()
        go.wait()
        real_remove(self, info)
        with lock:
            at_work -= 1

    def look(self: Spool) -> dict[str, SpooledImage]:
        nonlocal looks
        looks += 1
        removed.wait()
        return real_look(self)

    real_remove, real_look = Spool.remove, Spool.look
    images = [write_image(spool) for _ in range(MAX_CALLS // 2)]
    async with watched(watch, private_bus, spool, tmp_path / 'run'), await connect(private_bus.address) as client:
        monkeypatch.setattr(Spool, 'remove', remove)
        monkeypatch.setattr(Spool, 'look', look)
        call = partial(client.call, BUS_NAME, ROOT_PATH)
        removals = [asyncio.create_task(call(MANAGER, 'RemoveImage', 's', image)) for image in images]
        await asyncio.to_thread(several.wait)
        await call(MANAGER, 'ListJobs')     # which has come behind them all
        go.set()
        await asyncio.gather(*removals)
        removed.set()
    assert (most, looks) == (REMOVALS, 2)
    watch.judge()


async def test_many_jobs(watch: Watch, private_bus: PrivateBus, spool: Path, tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, 'WorkerPool', partial(WorkerPool, PLAYER))
    async with watched(watch, private_bus, spool, tmp_path / 'run'):
        await busy(private_bus, 'jobs')
    watch.judge()


async def test_a_tree_deep_down_is_looked_at_once(watch: Watch, private_bus: PrivateBus, spool: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again with each call about another one."""
    looked = 0

    def counted(pid: int) -> Stat:
        nonlocal looked
        looked += 1
        return read_stat(pid)

    monkeypatch.setattr(overlap, 'read_stat', counted)
    monkeypatch.setattr(daemon, 'WorkerPool', partial(WorkerPool, PLAYER))
    monkeypatch.setenv('PLAYER_SCENE', 'slow')
    with Brood() as brood:
        pids = chain(brood, DEPTH)
        async with watched(watch, private_bus, spool, tmp_path / 'run'), await connect(private_bus.address) as client:
            call = partial(client.call, BUS_NAME, ROOT_PATH, MANAGER)
            job = await call('Checkpoint', 'sa{sv}', f'pid:{pids[-1]}', {})
            assert DEPTH <= looked <= overlap.MOST
            for target in (f'pid:{os.getppid()}', f'pid:{pids[-1]}'):
                looked = 0
                answers = await asyncio.gather(*(call('Thaw', 'sa{sv}', target, {}) for _ in range(MAX_CALLS)),
                                               return_exceptions=True)
                assert {type(answer) for answer in answers} == {NoSuchTarget}
                assert not looked
            looked = 0
            with pytest.raises(Busy, match=f'works on pid:{pids[-1]}'):
                await call('Checkpoint', 'sa{sv}', f'pid:{pids[1]}', {})
            assert looked < DEPTH
            await client.call(BUS_NAME, job, JOB, 'Cancel', 'a{sv}', {})
    watch.judge()


def chain(brood: Brood, depth: int) -> list[int]:
    """The pids of processes each of which is a child of the one before."""
    pid, below = brood.ask(lambda: chain(brood, depth - 1) if depth > 1 else [])
    return [pid, *below]


@pytest.mark.needs('cgroup2', 'ptrace', 'gcc')
async def test_many_trees(watch: Watch, private_bus: PrivateBus, spool: Path, tmp_path: Path, sleeper: str) -> None:
    program = await asyncio.to_thread(build, tmp_path)
    with sleeping_tree(program, TASKS) as large:
        async with watched(watch, private_bus, spool, tmp_path / 'run'):
            await busy(private_bus, 'trees', sleeper, f'pid:{large}', str(TASKS))
    watch.judge()
