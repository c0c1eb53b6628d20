# SPDX-License-Identifier: LGPL-2.1-or-later
"""A multiprocessing pool that computes until there is a file `enough`; says how many results, and their sum (xor)."""

import multiprocessing
import pathlib

A, C = 6364136223846793005, 1442695040888963407


def work(number: int) -> int:
    value = number
    for _ in range(20_000):
        value = (value * A + C) % 2**64
    return value


def main() -> None:
    multiprocessing.set_start_method('fork')
    enough, count, total = pathlib.Path('enough'), 0, 0
    with multiprocessing.Pool(3) as pool:
        while not enough.exists():
            for value in pool.imap(work, range(count, count + 50)):
                total ^= value
                count += 1
            pathlib.Path('working').touch()
    print(count, total)


if __name__ == '__main__':
    main()
