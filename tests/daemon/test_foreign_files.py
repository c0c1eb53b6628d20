# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files of a client whose file system never answers: only he waits for it."""

import asyncio
import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ckptd.bus.client import Client, connect
from ckptd.bus.message import UnixFd
from ckptd.bus.names import BUS_NAME, IMAGE, MANAGER, ROOT, image_path
from ckptd.errors import CkptError, InvalidArgument
from ckptd.kernel import closing
from ckptd.kernel.pidfd import wait_dead
from tests.daemon.conftest import start_sleeper
from tests.daemon.test_daemon import frozen
from tests.jobs.test_spool import write_image
from tests.lib.bus import Served, family
from tests.lib.fuse import FLUSH, IOCTL, WRITE, HangingFile, fusectl
from tests.programs.conftest import await_that

pytestmark = [pytest.mark.needs('root', 'fuse'), pytest.mark.timeout(120)]


@pytest.fixture
def daemon(any_bus: str, tmp_path: Path, spool: Path) -> Iterator[Served]:
    with Served(any_bus, tmp_path, spool) as running:
        yield running
        assert running.stop() == 0
        assert 'Traceback' not in running.log


@pytest.fixture
def file(daemon: Served, tmp_path: Path) -> Iterator[HangingFile]:
    """Everybody is answered, the bus, too, which has the fd before ckptd has it; but for ckptd and its workers."""
    def hangs(opcode: int, process: int) -> bool:
        return process in (daemon.pid, *family(daemon.pid))

    fusectl()
    with HangingFile(tmp_path / 'fuse', hangs) as hanging:
        yield hanging


@contextmanager
def opened(file: HangingFile) -> Iterator[int]:
    fd = os.open(file.path, os.O_RDWR)
    try:
        yield fd
    finally:
        with suppress(OSError):        # ENOTCONN, where the connection was aborted
            os.close(fd)


async def ping(client: Client) -> None:
    """Somebody else's question."""
    async with asyncio.timeout(5):
        await client.call(BUS_NAME, ROOT, MANAGER, 'ListJobs')


async def give(client: Client, fd: int, options: dict[str, object] | None = None) -> None:
    await client.call(BUS_NAME, ROOT, MANAGER, 'CheckpointProcess', 'ha{sv}', UnixFd(fd), options or {})


@pytest.mark.needs('ptrace')
async def test_closes_that_are_not_answered(daemon: Served, file: HangingFile) -> None:
    """FUSE_FLUSH, of each close(2). With many of them the client loses his server, and nobody else anything."""
    async with await connect(daemon.address) as client, await connect(daemon.address) as other:
        with opened(file) as fd:
            for count in range(1, closing.CROWD + 1):
                with pytest.raises(InvalidArgument, match='not a pidfd'):
                    await give(client, fd)
                if count in (1, closing.CROWD - 1):
                    await asyncio.to_thread(file.wait_held, FLUSH, count)
                    assert not is_aborted(file)
                    await checkpoint(other)
            await asyncio.to_thread(await_that, 'the connection is aborted', lambda: is_aborted(file), 10)
            await asyncio.to_thread(await_that, 'it is logged', lambda: 'was aborted' in daemon.log, 10)
            await checkpoint(other)
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_few_closes_that_are_not_answered(daemon: Served, file: HangingFile) -> None:
    """Nobody is given up for them."""
    async with await connect(daemon.address) as client:
        with opened(file) as fd, pytest.raises(InvalidArgument, match='not a pidfd'):
            await give(client, fd)
        await asyncio.to_thread(file.wait_held, FLUSH)
        await asyncio.sleep(2 * closing.PATIENCE)
        assert not is_aborted(file)
        file.release()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_close_that_is_not_answered_and_the_end(daemon: Served, file: HangingFile) -> None:
    """Which is not that client's to put off."""
    async with await connect(daemon.address) as client:
        with opened(file) as fd, pytest.raises(InvalidArgument, match='not a pidfd'):
            await give(client, fd)
        await asyncio.to_thread(file.wait_held, FLUSH)
    assert await asyncio.to_thread(daemon.stop) == 0
    assert is_aborted(file)
    assert 'that it did not answer: 1\n' in daemon.log
    await asyncio.get_running_loop().shutdown_default_executor()


async def checkpoint(client: Client) -> None:
    """Somebody else's fd, of a process of his own."""
    with start_sleeper() as target, process(target.pid) as pidfd:
        try:
            await give(client, pidfd)
        finally:
            target.kill()


def is_aborted(file: HangingFile) -> bool:
    try:
        file.path.stat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


@contextmanager
def process(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


@pytest.mark.needs('cgroup2', 'ptrace')
@pytest.mark.parametrize('mode', ['auto', 'ptrace'])
async def test_kill_9_of_the_daemon_while_a_close_hangs(any_bus: str, tmp_path: Path, spool: Path, sleeper: str,
                                                        mode: str) -> None:
    """Its files stay open, so there is no end-of-file: the tree runs on all the same, worker and spawner end."""
    daemon = Served(any_bus, tmp_path, spool).start()
    pid = int(sleeper.partition(':')[2])
    with HangingFile(tmp_path / 'fuse', lambda opcode, process: process == daemon.pid) as file:
        async with await connect(daemon.address) as client:
            await client.call(BUS_NAME, ROOT, MANAGER, 'Freeze', 'sa{sv}', sleeper, {'freeze': mode})
            with opened(file) as fd, pytest.raises(InvalidArgument, match='not a pidfd'):
                await give(client, fd)
            await asyncio.to_thread(file.wait_held, FLUSH)
            assert stands_still(pid)
            pidfds = [os.pidfd_open(process) for process in family(daemon.pid)]
            assert len(pidfds) == 2     # spawner and worker
            daemon.process.kill()
            for pidfd in pidfds:
                assert await asyncio.to_thread(wait_dead, pidfd, 10)
                os.close(pidfd)
        assert not stands_still(pid)
        assert daemon.process.poll() is None
        assert list((daemon.runtime / 'freezes').iterdir()) == []
        file.release()
        assert await asyncio.to_thread(daemon.process.wait, 10) == -signal.SIGKILL
    await asyncio.get_running_loop().shutdown_default_executor()


def stands_still(pid: int) -> bool:
    return frozen(pid) or 'TracerPid:\t0' not in Path(f'/proc/{pid}/status').read_text()


async def test_what_is_no_terminal_is_not_asked_about_it(daemon: Served, file: HangingFile, spool: Path) -> None:
    image = write_image(spool)
    async with await connect(daemon.address) as client:
        with opened(file) as fd, pytest.raises(InvalidArgument, match='a file descriptor of a terminal'):
            async with asyncio.timeout(10):
                await client.call(BUS_NAME, ROOT, MANAGER, 'Restore', 'sa{sv}', image, {'terminal': UnixFd(fd)})
        assert IOCTL not in [opcode for opcode, _ in file.held]
        file.release()


async def test_an_export_into_it(daemon: Served, file: HangingFile, spool: Path) -> None:
    """The worker waits in write(2), and not even SIGKILL ends it. Its caller leaves, and others have their exports."""
    image = write_image(spool)
    async with await connect(daemon.address) as other:
        await ping(other)       # which looks into the spool
        async with await connect(daemon.address) as client:
            with opened(file) as fd:
                task = asyncio.create_task(client.call(BUS_NAME, image_path(image), IMAGE, 'Export', 'hsa{sv}',
                                                       UnixFd(fd),
                                                       'tar', {}, timeout=60))
                await asyncio.to_thread(file.wait_held, WRITE)
        with pytest.raises(CkptError):
            await task
        reader, writer = os.pipe()
        async with asyncio.timeout(30):
            await other.call(BUS_NAME, image_path(image), IMAGE, 'Export', 'hsa{sv}', UnixFd(writer), 'tar', {},
                             timeout=30)
        os.close(writer)
        assert os.read(reader, len(image)) == image.encode()
        os.close(reader)
        await asyncio.to_thread(await_that, 'the job is over', lambda: 'does not end by SIGKILL' in daemon.log, 40)
        assert await other.call(BUS_NAME, ROOT, MANAGER, 'ListJobs') != []
        file.release()
    await asyncio.get_running_loop().shutdown_default_executor()
