# SPDX-License-Identifier: LGPL-2.1-or-later
"""Crafted images on the way that their user has: imported as a stream, then restored, by workers of that user.

An image that an import refuses is put into the spool as well and restored from there, as one that was damaged there.
"""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ckptd.errors import CkptError
from ckptd.image.ids import new_image_id
from ckptd.image.manifest import NAME
from ckptd.protocol.messages import Log, Message
from tests.fuzz.bases import User
from tests.fuzz.looking import Report, choose, dice_of
from tests.lib.imgedit import pack
from tests.lib.mutate import Edit, Mutable
from tests.worker.driver import DirectWorker

PATIENCE = 60.0         # seconds for what takes a fraction of one
_INTERNAL = 'internal error'


class LoggedWorker(DirectWorker):
    """A worker whose log is kept."""

    def __init__(self) -> None:
        super().__init__(forked=True)
        self.log: list[str] = []
        self._socket.settimeout(PATIENCE)

    def receive(self) -> Message | None:
        message = super().receive()
        if isinstance(message, Log):
            self.log.append(message.text)
        return message


@dataclass
class Trial:
    """What came of one image: outcomes, 'restore: done', and sentences about what must not be."""
    outcomes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def restore_all(user: User, images: Sequence[Mutable], numbers: range, seed: int) -> Report:
    """Import and restore the crafted images of these numbers."""
    counts: Counter[str] = Counter()
    findings: list[str] = []
    for number in numbers:
        image, edits = choose(images, dice_of(seed, number))
        trial = attempt(user, image, edits)
        counts.update(trial.outcomes)
        findings += [f'image {number} of seed {seed}, {"; ".join(map(str, edits))}\n{wrong}\n' for wrong in trial.wrong]
    return Report(counts, findings)


def attempt(user: User, image: Mutable, edits: Sequence[Edit]) -> Trial:
    """Import and restore; nothing is left afterwards."""
    trial = Trial()
    with _stream(image, edits) as fd:
        answer = _do(user, trial, 'import', (fd,))
    name = str(answer['image']) if 'image' in answer else image.write(user.place.spool / new_image_id('fuzz'),
                                                                     edits).name
    _do(user, trial, 'restore', image=name)
    user.end_all()
    shutil.rmtree(user.place.spool / name)
    trial.wrong += _left_over(user)
    return trial


def _do(user: User, trial: Trial, operation: str, fds: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    request = user.place.request(0, **{'operation': operation, 'caller': user.caller, **more})
    outcome, answer = 'answer', {}
    with LoggedWorker() as worker:
        try:
            answer = worker.run(request, fds)
        except CkptError as error:
            outcome = error.name
            if _INTERNAL in error.message or worker.log or error.name == 'WorkerDied':
                trial.wrong.append('\n'.join((f'{operation}: {error.message}', *worker.log)))
        except (AssertionError, TimeoutError) as error:
            outcome = 'finding'
            trial.wrong.append(f'{operation}: {type(error).__name__} {error}')
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
    trial.outcomes.append(f'{operation}: {outcome}')
    return answer


@contextmanager
def _stream(image: Mutable, edits: Sequence[Edit]) -> Iterator[int]:
    """The image as a tar in memory."""
    fd = os.memfd_create('stream')
    try:
        with image.files(edits) as files:
            content = {}
            for name in (NAME, *sorted({*files.names()} - {NAME})):
                file = files.open(name)
                content[name] = os.pread(file, os.fstat(file).st_size, 0)
                os.close(file)
        with open(fd, 'wb', closefd=False) as out:
            out.write(pack(image.manifest.image, content))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _left_over(user: User) -> list[str]:
    """What a job has left in spool, runtime directory or cgroups."""
    bases = {image.name for image in user.place.images}
    found = [f'{path} was left' for path in user.place.spool.iterdir() if path.name not in bases]
    found += [f'{path} was left' for path in user.place.freezes]
    return found + [f'process {pid} was left' for pid in user.running()]
