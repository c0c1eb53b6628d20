# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that a worker of a user decides about a crafted image, in processes that are such workers, image after image.

    check-restore   damages, the plan of a restart, and all that stands in its way
    verify          every damage            (of one image in ten: it is the first part of the check)
    tree, export    tasks as rows; cores    (of one in three)

A result is an answer or an error of ckptd's. Anything else is a finding: an exception of another sort, which a worker
calls an internal error, more than PATIENCE seconds, or an fd that stays open.
"""

import os
import pickle
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import msgspec

from ckptd.errors import CkptError
from ckptd.image.source import GivenFiles, ImageFiles
from ckptd.operation.context import JobContext
from ckptd.protocol.channel import Channel
from ckptd.protocol.messages import Failed, Message
from ckptd.protocol.requests import CheckRestoreRequest
from ckptd.restore.prepare import check_restore
from ckptd.restore.xstate import own_xstate
from ckptd.worker.archive import _export_cores
from ckptd.worker.broker.identity import Identity, become, identity_of
from ckptd.worker.operations import image_tree, verify_image
from tests.fuzz.bases import User
from tests.lib.brood import fork
from tests.lib.mutate import Edit, Mutable

PATIENCE = 20           # seconds for what takes milliseconds
_encode = msgspec.msgpack.Encoder().encode


class Report(NamedTuple):
    """How often each operation had each outcome; and what must not be, a text each."""
    counts: Counter[str]
    findings: list[str]


class Hang(BaseException):
    """It takes longer than PATIENCE."""


class Unheard(Channel):
    """A channel whose messages are encoded and go nowhere. Nobody cancels."""

    def __init__(self) -> None:
        self.phase_name = ''

    def check(self) -> None: ...

    def send(self, message: Message, fds: object = ()) -> None: ...


class _Job(JobContext[Any]):
    """A job about files that are open already."""
    __slots__ = ('_given',)
    _given: ImageFiles

    def over(self, files: ImageFiles) -> '_Job':
        object.__setattr__(self, '_given', files)
        return self

    @contextmanager
    def image_files(self) -> Iterator[ImageFiles]:
        yield self._given


def _export(job: JobContext[Any]) -> None:
    with job.image_files() as files, open(os.devnull, 'wb') as sink:  # noqa: PTH123
        _export_cores(files, sink.fileno())


def choose(images: Sequence[Mutable], dice: random.Random) -> tuple[Mutable, list[Edit]]:
    """An image, rather a small one than a large one, and what to change."""
    [image] = dice.choices(images, [1 / one.records for one in images])
    return image, image.edits(dice)


def dice_of(seed: int, number: int) -> random.Random:
    """The image of that number is the same in every run with this seed."""
    return random.Random(f'{seed}/{number}')


def look(files: GivenFiles, request: CheckRestoreRequest, dice: random.Random) -> Iterator[tuple[str, str]]:
    """(operation and outcome, traceback of what is none)."""
    operations: list[tuple[str, Callable[[JobContext[Any]], None]]] = [('check-restore', check_restore)]
    operations += [('verify', verify_image)] if dice.random() < 0.1 else []
    operations += [('tree', image_tree), ('export', _export)] if dice.random() < 0.33 else []
    for operation, work in operations:
        job = _Job(request, Unheard()).over(files)      # the others read only the caller of the request
        outcome, trace = 'answer', ''
        try:
            with _deadline():
                work(job)
        except CkptError as error:
            Failed.of(error)
            outcome = error.name
        except OSError as error:        # a worker's answer has its errno; a dry run has rows for what stands in the way
            outcome = f'errno {error.errno}'
            trace = traceback.format_exc() if operation == 'check-restore' else ''
        except (Exception, Hang):  # noqa: BLE001 - what a worker calls an internal error
            outcome, trace = 'finding', traceback.format_exc()
        yield f'{operation}: {outcome}', trace


@contextmanager
def _deadline() -> Iterator[None]:
    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise Hang(f'{PATIENCE} s')

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def look_at(user: User, images: Sequence[Mutable], numbers: range, seed: int, processes: int) -> Report:
    """The crafted images of these numbers, by several processes of the user."""
    request = user.place.request(0, operation='check-restore', image=images[0].manifest.image,
                                 caller=user.caller)
    identity = identity_of(request, None)
    assert identity is not None
    request = msgspec.structs.replace(request, brokered=True,
                                      hard_limits=tuple(hard for _, hard in identity.bounds.limits))
    own_xstate()        # as a broker does before its worker becomes the user
    running = [_begin(identity, lambda shard=shard: _shard(images, numbers[shard::processes], seed, request))
               for shard in range(processes)]
    counts: Counter[str] = Counter()
    findings: list[str] = []
    for pid, reader in running:
        with os.fdopen(reader, 'rb') as pipe:
            data = pipe.read()
        _, status = os.waitpid(pid, 0)
        assert not status, f'a process that looks at images ended with {status:#x}'
        found, wrong = pickle.loads(data)
        counts.update(found)
        findings += wrong
    return Report(counts, findings)


def _begin(identity: Identity, work: Callable[[], Any]) -> tuple[int, int]:
    """Pid, and an fd to read the pickled result of the work from."""
    reader, writer = os.pipe()
    pid = fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        os.close(reader)
        become(identity)
        with os.fdopen(writer, 'wb') as pipe:
            pipe.write(pickle.dumps(work()))
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the boundary of the process
        traceback.print_exc()
    finally:
        os._exit(1)


def _shard(images: Sequence[Mutable], numbers: range, seed: int, request: CheckRestoreRequest
           ) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    findings: list[str] = []
    first: set[str] | None = None
    for number in numbers:
        dice = dice_of(seed, number)
        image, edits = choose(images, dice)
        with image.files(edits) as files:
            for outcome, trace in look(files, request, dice):
                counts[outcome] += 1
                if trace:
                    findings.append(f'image {number} of seed {seed}, {"; ".join(map(str, edits))}\n{outcome}\n{trace}')
        now = set(os.listdir('/proc/self/fd'))  # noqa: PTH208
        first = first or now        # after the first one all modules are there
        if len(now) > len(first):
            findings.append(f'image {number} of seed {seed}, {"; ".join(map(str, edits))}\n'
                            f'leaves {len(now) - len(first)} fds open\n')
            first = now
    return counts, findings
