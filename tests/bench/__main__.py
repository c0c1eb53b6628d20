# SPDX-License-Identifier: LGPL-2.1-or-later
"""All benchmarks: `make bench`, or python -m tests.bench [--json] [--runs N] [--scan N ...] [--tasks N ...] ...

An example that takes seconds: make bench BENCH_ARGS='--scan 500 --tasks 10 --memory 64 --runs 1'
"""

import argparse
import json
import tempfile
from pathlib import Path

from tests.bench import bench_bus, bench_dump, bench_restart, bench_scan
from tests.lib.bus import Daemon


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser('python -m tests.bench', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', action='store_true', help='one JSON object instead of tables')
    parser.add_argument('--runs', type=int, default=5, metavar='N', help='figures are medians of N (default: 5)')
    parser.add_argument('--scan', type=int, nargs='*', default=[1000, 10_000], metavar='N', help='trees to scan')
    parser.add_argument('--tasks', type=int, nargs='*', default=[10, 100, 1000], metavar='N',
                        help='trees to checkpoint and restart')
    parser.add_argument('--memory', type=int, default=1024, metavar='MIB', help='random memory to do the same with')
    parser.add_argument('--spool', type=Path, metavar='DIR', help='a directory on the disk to measure')
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()

    def show(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    scans = bench_scan.run(options.scan, options.runs)
    show(f'Scan and checks by size of the tree, medians of {options.runs}')
    show(bench_scan.table(scans))
    with tempfile.TemporaryDirectory(prefix='ckptd-bench-', dir=options.spool) as directory:
        spool = Path(directory, 'spool')
        with Daemon(Path(directory), spool) as daemon:
            show(f'\nCheckpoints, medians of {options.runs}\n{bench_dump.HEAD}')
            dumps = []
            for row in bench_dump.run(options.tasks, options.memory, daemon, options.runs):
                dumps.append(row.facts())
                show('\n'.join(bench_dump.lines(row)))
            show(f'\nRestarts, medians of {options.runs}\n{bench_restart.HEAD}')
            restarts = []
            for again in bench_restart.run(options.tasks, options.memory, daemon, options.runs, Path(directory)):
                restarts.append(again.facts())
                show('\n'.join(bench_restart.lines(again)))
            calls = bench_bus.run(daemon)
    show(f'\nCalls\n{bench_bus.HEAD}')
    show('\n'.join(row.line() for row in calls))
    if options.json:
        print(json.dumps({'scan': [row.facts() for row in scans], 'checkpoint': dumps, 'restart': restarts,
                          'calls': [row.facts() for row in calls]}))


if __name__ == '__main__':
    main()
