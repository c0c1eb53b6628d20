# SPDX-License-Identifier: LGPL-2.1-or-later
"""All benchmarks: python -m tests.bench, or `make bench`."""

import sys

from tests.bench import bench_dump, bench_scan

print('Scan and checks, by size of the tree')
print(bench_scan.table(bench_scan.run()))
print('\nCheckpoints')
bench_dump.main(sys.argv[1:])
