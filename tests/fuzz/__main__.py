# SPDX-License-Identifier: LGPL-2.1-or-later
"""Crafted images and random messages: `make fuzz`, or python -m tests.fuzz [--images N] [--messages N] [--seed SEED]

    images      looked at by a worker of an ordinary user (tests/fuzz/looking.py); one in a hundred is imported and
                restored as well (tests/fuzz/restoring.py)
    messages    to a daemon of root, by several users (tests/fuzz/messages.py)

As root. The seed is printed; with the same seed and numbers the same is done. Exits with 1 if anything was found, or is
left behind.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable

import pyroute2.netlink.diag  # noqa: F401 - it is imported late, and then a user who cannot read the code has it not

from tests.fuzz.bases import ALL, user_in
from tests.fuzz.looking import Report, look_at
from tests.fuzz.messages import flood
from tests.fuzz.restoring import restore_all
from tests.lib import settled

ONE_IN = 100            # images that are restored


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser('python -m tests.fuzz', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=100_000, metavar='N', help='0 for none (default: 100000)')
    parser.add_argument('--messages', type=int, default=100_000, metavar='N', help='0 for none (default: 100000)')
    parser.add_argument('--seed', type=int, metavar='SEED', help='of an earlier run, to repeat it')
    return parser.parse_args()


def show(what: str, count: int, seed: int, run: Callable[[], Report]) -> int:
    """Do it, and print what came of it; how many findings there are."""
    begun = time.monotonic()
    report = run()
    print(f'{count} {what} in {time.monotonic() - begun:.0f} s, {len(report.findings)} findings, seed {seed}')
    for outcome, number in sorted(report.counts.items()):
        print(f'    {number:8} {outcome}')
    print(*report.findings, sep='\n', flush=True)
    return len(report.findings)


def main() -> int:
    options = parse_arguments()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f'seed {seed}', flush=True)
    found = 0
    settled.become_subreaper()
    with settled.cgroup_of_our_own() as cgroup:
        before = settled.Picture.take(cgroup)
        if options.images:
            with user_in() as user, user.images(ALL) as images:
                numbers = range(options.images)
                found += show('images looked at', len(numbers), seed,
                              lambda: look_at(user, images, numbers, seed, os.cpu_count() or 1))
                numbers = numbers[::ONE_IN]
                found += show('images restored', len(numbers), seed, lambda: restore_all(user, images, numbers, seed))
        if options.messages:
            found += show('messages', options.messages, seed, lambda: flood(options.messages, seed))
        left = before.left(cgroup)
    print(*left, sep='\n')
    return int(bool(found or left))


if __name__ == '__main__':
    sys.exit(main())
