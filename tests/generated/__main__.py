# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random programs are checkpointed, killed and restored: `make random`, or python -m tests.generated [--count N]
[--seed SEED]

As root; with --user, the programs, checkpoints and restarts are those of an ordinary user. The seed is printed; with
the same seed and number the same programs are run. A program that does not come back as it was is shrunk and printed.
Exits with 1 if there was one.
"""

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.bases import User, user_in
from tests.generated.programs import Operation, programs
from tests.generated.trial import Trial, prepared
from tests.lib import settled
from tests.worker.driver import Place


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser('python -m tests.generated', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=2000, metavar='N', help='programs (default: 2000)')
    parser.add_argument('--seed', type=int, metavar='SEED', help='of an earlier run, to repeat it')
    parser.add_argument('--user', action='store_true', help='as an ordinary user')
    parser.add_argument('--all', action='store_true', help='go on after a finding, and shrink none')
    return parser.parse_args()


class Run:
    """A run of many programs in one directory."""

    def __init__(self, directory: Path, place: Place, user: User | None) -> None:
        self._directory, self._place, self._user = directory, place, user
        self._count = 0
        self.outcomes: Counter[str] = Counter()

    def attempt(self, steps: list[Operation]) -> list[str]:
        self._count += 1
        outcome = Trial(self._place, self._directory / str(self._count), steps, self._user).run()
        self.outcomes[outcome.what] += 1
        return outcome.wrong


def main() -> int:
    options = parse_arguments()
    settled.become_subreaper()
    with settled.cgroup_of_our_own(), tempfile.TemporaryDirectory(prefix='ckptd-generated-') as name:
        directory = Path(name)
        directory.chmod(0o711)
        if not options.user:
            return run_all(options, Run(directory, Place(directory).make(), None))
        with user_in(directory) as user:
            return run_all(options, Run(user.attacker.home, user.place, user))


def run_all(options: argparse.Namespace, run: Run) -> int:
    """Run the programs. Return 1 if there were findings."""
    number = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f'seed {number}', flush=True)
    begun, found = time.monotonic(), 0
    phases = (Phase.generate,) if options.all else (Phase.generate, Phase.shrink)

    @seed(number)
    @settings(max_examples=options.count, deadline=None, database=None, phases=phases,
              suppress_health_check=list(HealthCheck))
    @given(programs())
    def is_as_before(steps: list[Operation]) -> None:
        nonlocal found
        wrong = run.attempt(steps)
        if options.all and wrong:
            found += 1
            print(f'--- {steps}', *wrong, sep='\n    ', flush=True)
        assert options.all or not wrong, '\n'.join(wrong) + '\n' + prepared(steps).text
    try:
        is_as_before()
    except (AssertionError, ExceptionGroup):      # of one program, or of several that fail in different ways
        traceback.print_exc()
        found += 1
    print(f'{sum(run.outcomes.values())} programs in {time.monotonic() - begun:.0f} s, {found} findings, seed {number}')
    for outcome, times in sorted(run.outcomes.items()):
        print(f'    {times:6} {outcome}')
    return int(bool(found))


if __name__ == '__main__':
    sys.exit(main())
