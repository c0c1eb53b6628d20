# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pipes and FIFOs: their data is copied and stays where it is."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.objects.files.base import OpenFile, read_open_file
from ckptd.objects.files.fifo import Fifo
from ckptd.objects.files.pipe import Pipe
from tests.lib.brood import Brood
from tests.live.kinds.conftest import Bulk, kind_of

Opened = Callable[[Callable[[], int]], OpenFile]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of the test process, which is then the victim."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    yield read, write
    for end in (read, write):
        os.close(end)


def dump(fd: int, bulk: Bulk) -> Pipe:
    record = kind_of(own(fd)).dump(own(fd), bulk)
    assert isinstance(record, Pipe)
    return Pipe.decode(record.encode())


def own(fd: int) -> OpenFile:
    return read_open_file(os.getpid(), fd)


def content(record: Pipe | Fifo, bulk: Bulk) -> bytes:
    data = b''.join(map(bulk.read, record.data))
    assert sum(record.lengths) == len(data)
    return data


@pytest.mark.parametrize('data', [b'', b'x', b'hello' * 100, os.urandom(65536)], ids=['empty', 'one', 'some', 'full'])
def test_data_is_copied_and_stays(pipe: tuple[int, int], bulk: Bulk, data: bytes) -> None:
    read, write = pipe
    os.write(write, data)
    for _ in range(2):
        record = dump(read, bulk)
        assert content(record, bulk) == data
    assert (record.capacity, record.packet_mode, record.inode) == (65536, 0, os.fstat(read).st_ino)
    assert (os.read(read, 1 << 20) if data else b'') == data


def test_many_small_writes_after_a_partial_read(pipe: tuple[int, int], bulk: Bulk) -> None:
    read, write = pipe
    for number in range(500):
        os.write(write, b'%4d' % number)
    os.read(read, 6)
    record = dump(read, bulk)
    assert content(record, bulk) == b''.join(b'%4d' % number for number in range(500))[6:]


def test_enlarged_pipe(pipe: tuple[int, int], bulk: Bulk) -> None:
    read, write = pipe
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
    data = os.urandom(size)
    assert os.write(write, data) == size
    record = dump(read, bulk)
    assert (record.capacity, content(record, bulk)) == (size, data)


def test_data_goes_with_the_read_end(pipe: tuple[int, int], bulk: Bulk) -> None:
    read, write = pipe
    os.write(write, b'hello')
    record = dump(write, bulk)
    assert (record.data, record.lengths, bulk.stretches) == ((), (), [])
    assert record.inode == dump(read, bulk).inode


def test_packets_stay_packets(bulk: Bulk) -> None:
    read, write = os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
    try:
        for packet in (b'one', b'three', b'x' * 4096):
            os.write(write, packet)
        record = dump(read, bulk)
        assert (record.packet_mode, record.lengths) == (0, (3, 5, 4096))    # O_DIRECT is of the end that writes
        assert dump(write, bulk).packet_mode == 1
        assert [os.read(read, 9999) for _ in range(3)] == [b'one', b'three', b'x' * 4096]
    finally:
        os.close(read)
        os.close(write)


def test_data_whose_writer_is_gone(bulk: Bulk) -> None:
    read, write = os.pipe()
    os.write(write, b'last words')
    os.close(write)
    try:
        assert content(dump(read, bulk), bulk) == b'last words'
        endpoint = kind_of(own(read)).endpoint(own(read))
        assert (endpoint.holds, endpoint.lacks) == ({'read'}, set())
    finally:
        os.close(read)


def test_blocked_reader_sees_nothing_of_it(brood: Brood, bulk: Bulk) -> None:
    """A dump neither wakes the reader nor takes its place in the queue."""
    ends = os.pipe()
    answer = os.pipe()

    def reader() -> None:
        import threading
        threading.Thread(target=lambda: os.write(answer[1], os.read(ends[0], 100)), daemon=True).start()
    pid = brood.fork(reader)
    file = read_open_file(pid, ends[0])
    record = kind_of(file).dump(file, bulk)
    assert record.data == ()
    os.write(ends[1], b'now')
    assert os.read(answer[0], 100) == b'now'
    for fd in (*ends, *answer):
        os.close(fd)


def test_endpoints_find_each_other(pipe: tuple[int, int]) -> None:
    read, write = (kind_of(own(end)).endpoint(own(end)) for end in pipe)
    assert read.key == write.key
    assert (read.holds, read.lacks) == ({'read'}, {'write'})
    assert (write.holds, write.lacks) == ({'write'}, {'read'})


def test_fifo(opened: Opened, bulk: Bulk, tmp_path: Path) -> None:
    path = tmp_path / 'fifo'
    os.mkfifo(path)

    def work() -> int:
        fd = os.open(path, os.O_RDWR)
        os.write(fd, b'in the queue')
        return fd
    file = opened(work)
    record = kind_of(file).dump(file, bulk)
    assert isinstance(record, Fifo)
    assert (record.path, record.deleted, content(record, bulk)) == (str(path), 0, b'in the queue')
    assert kind_of(file).endpoint(file).holds == {'read', 'write'}
    path.unlink()
    later = read_open_file(file.pid, file.fd)
    gone = kind_of(later).dump(later, bulk)
    assert (gone.path, gone.deleted, content(gone, bulk)) == (str(path), 1, b'in the queue')
