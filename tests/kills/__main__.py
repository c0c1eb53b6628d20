# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kill ckptd at random moments of its jobs: `make kills`, or python -m tests.kills [--count N] [--seed S] [--first N]

The seed is said at the beginning and with each failure. --seed S --first N --count 1 is round N of it once more, with
the same tree, the same processes killed after the same share of the time; what is going on in that moment may differ.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.kills.rounds import run
from tests.lib import gate, settled


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser('python -m tests.kills', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=1000, metavar='N', help='rounds (default: 1000)')
    parser.add_argument('--seed', type=int, default=random.randrange(10**9), metavar='S', help='default: any')
    parser.add_argument('--first', type=int, default=0, metavar='N', help='number of the first round (default: 0)')
    return parser.parse_args()


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    options = parse_arguments()
    for need in ('root', 'cgroup2', 'ptrace', 'dbus', 'unshare', 'gcc'):
        if reason := gate.missing(need):
            say(f'{need}: {reason}. To have it: {gate.NEEDS[need].fix}')
            return 1
    say(f'seed {options.seed}, {options.count} rounds')
    begin = time.monotonic()
    settled.become_subreaper()
    with settled.cgroup_of_our_own() as cgroup, tempfile.TemporaryDirectory(prefix='ckptd-kills-') as directory:
        assert cgroup is not None
        report = run(Path(directory), cgroup, options.seed, range(options.first, options.first + options.count), say)
    say('\n'.join(report.lines()))
    say(f'seed {options.seed}, {time.monotonic() - begin:.0f} s')
    return 1 if report.failures else 0


if __name__ == '__main__':
    sys.exit(main())
