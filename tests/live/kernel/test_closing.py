# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closes that a file server does not answer, in this process."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptd.kernel import closing, fuse
from ckptd.kernel.statx import device_of
from tests.lib.fuse import FLUSH, HangingFile, fusectl
from tests.lib.settled import join_closers
from tests.programs.conftest import await_that

pytestmark = pytest.mark.needs('root', 'fuse')


@pytest.fixture(autouse=True)
def told() -> Iterator[list[closing.Aborted]]:
    """What was aborted."""
    aborted: list[closing.Aborted] = []
    closing.report_to(aborted.append)
    fusectl()
    yield aborted
    closing.report_to(lambda _: None)
    join_closers()


class Files:
    """Of any number of file servers, which answer no close by us."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory, self._stack = directory, stack

    def one(self) -> HangingFile:
        return self._stack.enter_context(HangingFile(self._directory / f'fuse{time.monotonic_ns()}',
                                                     lambda opcode, process: opcode == FLUSH))


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    with ExitStack() as stack:
        yield Files(tmp_path, stack)


def close(file: HangingFile, count: int) -> int:
    """As if a client had sent it so often; the device."""
    for _ in range(count):
        fd = os.open(file.path, os.O_RDWR)
        device = device_of(fd)
        closing.close_foreign(fd)
    file.wait_held(FLUSH, count)
    return device


def await_fewer(count: int) -> None:
    await_that(f'fewer than {count} wait', lambda: closing.closing() < count, 10)


def test_the_device(files: Files) -> None:
    """As stat(2) and fusectl name it."""
    file = files.one()
    with contextlib.closing(Path(file.path).open()) as opened:
        device = device_of(opened.fileno())
        assert device == os.stat(file.path).st_dev      # noqa: PTH116 - the number, of which the major one is 0
        file.release()
    directory = fuse.connections()
    assert directory is not None
    assert (directory / str(device) / 'abort').exists()
    assert not fuse.abort(directory, 0xfffffff)


def test_below_a_crowd_nobody_is_given_up(files: Files, told: list[closing.Aborted]) -> None:
    file = files.one()
    close(file, closing.CROWD - 1)
    time.sleep(2.5 * closing.PATIENCE)
    assert closing.closing() == closing.CROWD - 1
    file.release()
    await_fewer(1)
    assert told == []


def test_a_crowd(files: Files, told: list[closing.Aborted]) -> None:
    """Whoever has most of it goes; with that there is room, and the other one is left alone."""
    many, few = files.one(), files.one()
    close(few, closing.ROOM - 1)
    device = close(many, closing.CROWD - closing.ROOM + 1)
    await_fewer(closing.ROOM)
    await_that('it is told', lambda: told, 10)      # after it was done
    assert closing.closing() == closing.ROOM - 1
    assert told == [closing.Aborted(device, closing.CROWD - closing.ROOM + 1)]
    assert str(told[0]) == (f'the connection to the file server of device 0:{device} was aborted; closes of clients\' '
                            f'files that it did not answer: {told[0].closes}')
    few.release()
    await_fewer(1)


def test_a_crowd_of_many_servers(files: Files, told: list[closing.Aborted]) -> None:
    """Until there is room, and again with the next crowd."""
    for _ in range(2):
        told.clear()
        made = [files.one() for _ in range(4)]
        for file in made:
            close(file, closing.CROWD // 4)
        await_fewer(closing.ROOM)
        await_that('each is told', lambda: len(told) == 3, 10)
        for file in made:
            file.release()
        await_fewer(1)


def test_what_is_answered_in_time(files: Files, told: list[closing.Aborted]) -> None:
    """Slow is not dead, and many at once is no crowd of those that hang."""
    file = files.one()
    close(file, closing.CROWD)
    file.release()
    await_fewer(1)
    assert told == []


def test_the_end(files: Files, told: list[closing.Aborted]) -> None:
    before = time.monotonic()
    closing.abort_all()
    assert time.monotonic() - before < closing.PATIENCE
    devices = [close(files.one(), 1), close(files.one(), 2)]
    closing.abort_all()
    assert closing.closing() == 0
    assert told == [closing.Aborted(devices[1], 2), closing.Aborted(devices[0], 1)]


def test_without_fusectl(files: Files, told: list[closing.Aborted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, 'connections', lambda: None)
    file = files.one()
    close(file, 1)
    closing.abort_all()
    assert closing.closing() == 1
    file.release()
    await_fewer(1)
    assert told == []
