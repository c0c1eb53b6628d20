# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rounds: a tree, a job about it, somebody of ckptd killed in the middle; then nothing may be harmed, stopped or left.

    operation       what is asked for                       a tree afterwards
    checkpoint      an image, the tree runs on              is whole
    kill            an image, the tree is ended             is whole; or gone, and comes back from its image
    restore         the tree that has an image              is whole; or gone, and comes back from its image
    rollback        the same, its file as it was then       the same, the file as it was found

A tree that is whole checks itself, see tree.c. The daemon is started again where it was killed, as systemd would do.
"""

import contextlib
import os
import select
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ckptd.client.sync import SyncCkptd
from ckptd.errors import CkptError
from ckptd.image.verify import verify
from tests.kills.stage import OTHER_CONTENT, Stage, Tree
from tests.kills.strike import ONE, TWO, Ended, Lifetimes, Moment, moment, strike
from tests.security.attacker import Call

OPERATIONS = ('checkpoint', 'kill', 'restore', 'rollback')
PATIENCE = 5.0          # seconds until all is well, from the kill or from when the next daemon is ready
UNDISTURBED = 20.0      # the same for a job that nobody's death concerns
CALIBRATIONS = 5        # jobs of each operation that nobody disturbs
MISSES = 30             # times that somebody is not there any more who is to be killed
EARLIER = 0.8           # each time the next one is killed after so much of the time
SAID = 100              # rounds after which something is said
LOOK = 0.03             # seconds between two looks at what is left
HARMED, STOPPED, LEFT = 'harmed', 'stopped', 'left over'


@dataclass(frozen=True)
class Failure:
    """One thing that is not as it must be. kind: HARMED, STOPPED or LEFT."""
    kind: str
    text: str


@dataclass(frozen=True)
class Round:
    """What happens in one round."""
    number: int
    operation: str
    who: tuple[str, ...]
    alone: bool
    at: Moment

    @classmethod
    def of(cls, seed: int, number: int, attempt: int = 0) -> 'Round':
        """The same for the same numbers. attempt: another moment for the same processes, and rather an earlier one."""
        random = Random(f'{seed}.{number}')
        operation = random.choice(OPERATIONS)
        who = random.choice(ONE if random.random() < .6 else TWO)
        alone = random.random() < .5
        for _ in range(attempt + 1):
            at = moment(random)
        return cls(number, operation, who, alone, at._replace(share=at.share * EARLIER ** attempt))

    def __str__(self) -> str:
        return (f'round {self.number}: {self.operation} of a tree {"alone" if self.alone else "among others"} in its '
                f'cgroup, {" and ".join(self.who)} killed at {self.at.share:.4f} of the time')


@dataclass
class Report:
    """What came of all rounds."""
    killed: Counter[tuple[str, str]] = field(default_factory=Counter)       # (operation, who)
    after: Counter[tuple[str, str]] = field(default_factory=Counter)        # (operation, what became of the tree)
    misses: int = 0
    slowest: float = 0.0
    failures: list[tuple[str, list[Failure]]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """A table, and what went wrong."""
        for whose, title in ((self.killed, 'killed'), (self.after, 'the tree')):
            yield f'{title:<24}' + ''.join(f'{operation:>12}' for operation in OPERATIONS) + f'{"all":>12}'
            for row in sorted({row for _, row in whose}):
                numbers = [whose[operation, row] for operation in OPERATIONS]
                yield f'{row:<24}' + ''.join(f'{number:>12}' for number in (*numbers, sum(numbers)))
        yield f'{sum(self.killed.values())} rounds, {self.misses} more whose job was over; ' \
              f'at most {self.slowest:.2f} s until all was well'
        kinds = Counter(failure.kind for _, failures in self.failures for failure in failures)
        yield ', '.join(f'{kinds[kind]} {kind}' for kind in (HARMED, STOPPED, LEFT))
        for title, failures in self.failures:
            yield title
            yield from (f'    {failure.kind}: {failure.text}' for failure in failures)


class Rounds:
    """Rounds on one stage, with one seed."""

    def __init__(self, stage: Stage, seed: int, say: Callable[[str], object] = lambda line: None) -> None:
        self._stage, self._seed, self._say = stage, seed, say
        self._lifetimes = Lifetimes()
        self.report = Report()

    def calibrate(self) -> None:
        """Learn how long each part is there. AssertionError if something goes wrong although nobody is killed."""
        for operation in OPERATIONS:
            for count in range(CALIBRATIONS):
                with self._stage.tree(alone=bool(count % 2)) as tree:
                    job = Job(self._stage, operation, tree)
                    job.prepare()
                    failures = self._play(job, lambda over, what=operation: self._watched(what, over))
                assert not failures, (operation, failures)

    def _watched(self, operation: str, over: Ended) -> list[str]:
        self._lifetimes.watch(self._stage, operation, over)
        return []

    def play(self, number: int) -> None:
        """One round, at another moment where nobody was there to be killed."""
        for attempt in range(MISSES):
            this = Round.of(self._seed, number, attempt)
            if killed := self._try(this):
                self.report.killed[this.operation, '+'.join(sorted(killed))] += 1
                return
            self.report.misses += 1
        raise AssertionError(f'{this}: nobody is ever there')

    def _try(self, this: Round) -> list[str]:
        """Who was killed."""
        killed: list[str] = []

        def act(over: Ended) -> list[str]:
            lifetime = self._lifetimes.usual(this.operation, this.who[0])
            killed.extend(strike(self._stage, this.who, lifetime, this.at, over))
            return killed

        with self._stage.tree(alone=this.alone) as tree:
            job = Job(self._stage, this.operation, tree)
            try:
                job.prepare()
                failures = self._play(job, act)
            except (AssertionError, CkptError, OSError):
                failures = [Failure(HARMED, traceback.format_exc())]
            if failures:
                self._fail(this, killed, job, failures)
        if killed:
            self.report.after[this.operation, job.became or 'not well'] += 1
        return killed

    def _fail(self, this: Round, killed: list[str], job: 'Job', failures: list[Failure]) -> None:
        title = f'seed {self._seed}, {this}; killed: {" and ".join(killed) or "nobody"}; answer: {job.answer}'
        self.report.failures.append((title, failures))
        self._say(title)
        for failure in failures:
            self._say(f'    {failure.kind}: {failure.text}')
        self._say('\n'.join(f'    | {line}' for line in self._stage.daemon.log.splitlines()[-20:]))
        self._stage.reset()

    def _play(self, job: 'Job', act: Callable[[Ended], list[str]]) -> list[Failure]:
        """The job, with what is done to it; what is wrong in the end."""
        stage = self._stage
        with job.begin() as call:
            killed = act(call.ended)
            begin = since = time.monotonic()
            if 'daemon' in killed:
                stage.daemon.process.wait()
                stage.start_daemon()
                since = time.monotonic()
            # a job outlives the spawner, or waits for the next one
            is_concerned = bool({*killed} - {'spawner'})
            if failures := job.settle(call, since + (PATIENCE if is_concerned else UNDISTURBED)):
                return failures
            if is_concerned:
                self.report.slowest = max(self.report.slowest, time.monotonic() - begin)
        if failures := [Failure(HARMED, text) for text in job.finish()]:
            return failures
        stage.forget_images()
        if 'Traceback' in stage.daemon.log or 'internal error' in stage.daemon.log:
            return [Failure(HARMED, f'the daemon said: {stage.daemon.log}')]
        return []


class Job:
    """One job about a tree, and what may come of it."""

    def __init__(self, stage: Stage, operation: str, tree: Tree) -> None:
        self._stage, self._operation, self._tree = stage, operation, tree
        self.answer = 'none'
        self.became = ''

    def prepare(self) -> None:
        """Of a restore: the image, and no tree."""
        if self._operation in ('restore', 'rollback'):
            self._tree.image = self._stage.user.checkpoint(self._tree.program,
                                                           save_files=self._operation == 'rollback')
        if self._operation == 'rollback':
            self._tree.file.write_bytes(OTHER_CONTENT)

    @contextlib.contextmanager
    def begin(self) -> 'Iterator[Asked]':
        """Ask for it; the call has begun when this returns."""
        reader, writer = os.pipe()
        with open(reader, 'rb') as told, self._stage.user.begin(self._ask(writer)) as call:  # noqa: PTH123
            os.close(writer)
            told.read(1)
            yield Asked(call)

    def _ask(self, writer: int) -> Callable[[], Any]:
        def work() -> Any:
            with contextlib.closing(open(writer, 'wb')) as telling:
                return self._stage.user.connected(lambda ckptd: self._request(ckptd, telling.close))
        return work

    def _request(self, ckptd: SyncCkptd, begun: Callable[[], object]) -> str:
        """In a process of the user's."""
        begun()
        target = f'pid:{self._tree.root}'
        match self._operation:
            case 'checkpoint' | 'kill':
                after = 'kill' if self._operation == 'kill' else 'resume'
                return ckptd.checkpoint(target, after=after, detach=True).wait().image
            case _:
                return str(ckptd.restore(self._tree.image, **self._options()).wait().root)

    def _options(self) -> Any:
        changed = {'changed_files': 'rollback'} if self._operation == 'rollback' else {}
        return {'detach': True, **changed}

    def settle(self, call: 'Asked', deadline: float) -> list[Failure]:
        """Wait until all is well; what is not by then."""
        while failures := list(self._wrong(call)):
            if time.monotonic() > deadline:
                return failures
            time.sleep(LOOK)
        self.became = 'there' if self._tree.alive() else 'gone'
        return [Failure(HARMED, text) for text in self._contradictions(call)]

    def _wrong(self, call: 'Asked') -> Iterator[Failure]:
        if not call.ended():
            yield Failure(LEFT, 'the caller has no answer')
        else:
            self._stage.reap(call.pid)
        # the tree last: nobody is left then who could still change it
        yield from (Failure(LEFT, text) for text in self._stage.left_over(self._tree, call.pid))
        yield from (Failure(STOPPED, text) for text in self._tree.stops())
        yield from (Failure(HARMED, text) for text in self._tree.missing())

    def _contradictions(self, call: 'Asked') -> Iterator[str]:
        """Between the answer, the tree and the spool."""
        is_done, self.answer = call.answer()
        is_there, images = self.became == 'there', self._stage.images()
        yield from (f'image {image} is damaged: {damage}' for image in images
                    for damage in verify(self._stage.spool / image))
        if self._operation == 'checkpoint' and not is_there:
            yield 'the tree is gone'
        if not is_there and len(images) != 1:
            yield f'the tree is gone, and there are the images {images}'
        if is_done and not images:
            yield 'it was done, and there is no image'
        if is_done and is_there != (self._operation != 'kill'):
            yield f'it was done, and the tree is {self.became}'

    def finish(self) -> Iterator[str]:
        """Bring back a tree that is gone, and have the tree check itself."""
        tree = self._tree
        if not tree.alive():
            if self._operation == 'rollback' and tree.file.read_bytes() != OTHER_CONTENT:
                yield 'the tree is gone, and its file is not as it was found'
            [tree.image] = self._stage.images()
            outcome = self._stage.user.restore(tree.image, **self._options())
            if not outcome.root:
                yield f'the image cannot be restored: {outcome.words}'
                return
            if tree.alive() != tree.tasks:
                yield f'of the tasks {sorted(tree.tasks)} there came back {sorted(tree.alive())}'
                return
        if words := tree.check_itself():
            yield words


class Asked:
    """A call that was begun."""

    def __init__(self, call: Call) -> None:
        self._call, self.pid = call, call.pid

    def ended(self) -> bool:
        """There is an answer, or its end."""
        return bool(select.select([self._call._reader], [], [], 0)[0])

    def answer(self) -> tuple[bool, str]:
        """Whether it was done, and the words."""
        try:
            return True, str(self._call.result())
        except CkptError as error:
            return False, f'{type(error).__name__}: {error}'


def run(directory: Path, cgroup: Path, seed: int, numbers: range, say: Callable[[str], object]) -> Report:
    """Play rounds; say what goes wrong at once."""
    with Stage(directory, cgroup) as stage:
        rounds = Rounds(stage, seed, say)
        rounds.calibrate()
        for done, number in enumerate(numbers, 1):
            rounds.play(number)
            if done % SAID == 0:
                say(f'{done} rounds of seed {seed}, {len(rounds.report.failures)} failed')
    return rounds.report
