# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree of counting processes: argv[1] of them, each with a row in shared memory that goes up all the time."""

import mmap
import os
import struct
import sys
import time

from victim import not_the_one_to_report, ready, wait_for_go

CELL = struct.Struct('QQ')      # rounds, and their sum of squares modulo 2**64


def count(shared: mmap.mmap, index: int) -> None:
    rounds, squares = 0, 0
    parent = os.getppid()
    while shared[-1] == 0 and os.getppid() == parent:
        rounds += 1
        squares = (squares + rounds * rounds) % 2**64
        CELL.pack_into(shared, index * CELL.size, rounds, squares)
        time.sleep(0.001)
    assert CELL.unpack_from(shared, index * CELL.size) == (rounds, squares)
    assert squares == rounds * (rounds + 1) * (2 * rounds + 1) // 6 % 2**64


def start(shared: mmap.mmap, index: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        not_the_one_to_report()
        count(shared, index)
        status = 0
    finally:
        os._exit(status)


def progress(shared: mmap.mmap, processes: int) -> list[int]:
    return [CELL.unpack_from(shared, index * CELL.size)[0] for index in range(processes)]


def main() -> None:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    shared = mmap.mmap(-1, processes * CELL.size + 1)
    children = [start(shared, index) for index in range(processes)]
    while 0 in progress(shared, processes):
        time.sleep(0.001)
    ready()
    wait_for_go()
    before = progress(shared, processes)
    while any(now <= then for now, then in zip(progress(shared, processes), before, strict=True)):
        time.sleep(0.001)
    shared[-1] = 1
    for child in children:
        assert os.waitpid(child, 0) == (child, 0)


if __name__ == '__main__':
    main()
