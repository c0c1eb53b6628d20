# SPDX-License-Identifier: LGPL-2.1-or-later
"""One journal entry: the steps of one freeze, in a locked file."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from ckptd import flock
from ckptd.errors import CkptError
from ckptd.fileio import write_all
from ckptd.journal.steps import AnyStep, Count, Lifetime, Move, Moved, StepContext

FaultPoint = Callable[[str], None]

VERSION = 1
WORK_PREFIX = 'ckptd-'
MAX_ENTRY = 32 << 20        # bytes; a tree of 100,000 processes has about 6 MiB
SUFFIX = '.jsonl'


class Begin(msgspec.Struct, tag=True, frozen=True):
    """The first line of an entry. boot: pids and cgroups of an earlier boot are meaningless."""
    version: Count
    boot: Annotated[str, msgspec.Meta(max_length=64)]
    job: Count
    target: Annotated[str, msgspec.Meta(max_length=4096)]
    mode: Annotated[str, msgspec.Meta(max_length=16)]


class Undone(msgspec.Struct, tag=True, frozen=True):
    """Step number `step` (0 is the first one after Begin) was undone out of order."""
    step: Count


class Redone(msgspec.Struct, tag=True, frozen=True):
    """Step number `step` is about to be taken again. It keeps its place: later steps are undone before it."""
    step: Count


_line: msgspec.json.Decoder[AnyStep | Undone | Redone] = msgspec.json.Decoder(AnyStep | Undone | Redone)
_first_line = msgspec.json.Decoder(Begin)


class Contents(NamedTuple):
    """The contents of an entry."""
    begin: Begin
    steps: list[AnyStep | None]    # None stands for a damaged line, to keep the numbering
    undone: set[int]
    damaged: int                   # number of lines that cannot be parsed


def parse_entry(data: bytes) -> Contents:
    """Parse every valid line. ValueError if the first one is not."""
    first, *lines = data.split(b'\n')
    try:
        contents = Contents(_first_line.decode(first), [], set(), 0)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'not a freeze entry: {error}') from None
    if contents.begin.version != VERSION:
        raise ValueError(f'version {contents.begin.version} of the journal is unknown')
    damaged = 0
    for line in lines[:-1]:         # text behind the last newline was never finished
        try:
            step = _line.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            damaged += 1
            contents.steps.append(None)
            continue
        match step:
            case Undone(number):
                contents.undone.add(number)
            case Redone(number):
                contents.undone.discard(number)
            case _:
                contents.steps.append(step)
    return contents._replace(damaged=damaged)


def no_fault(point: str) -> None:
    """Do nothing at a fault point."""


class JournalEntry:
    """One freeze in the journal. It owns the locked fd. `finish` deletes the file, `close` leaves it for a recovery."""

    def __init__(self, path: Path, fd: int, contents: Contents) -> None:
        self.path = path
        self.begin, self.steps, self._undone, self.damaged = contents
        self._fd = fd

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(SUFFIX)

    @property
    def work_name(self) -> str:
        """Name of the cgroup that this freeze may make."""
        return WORK_PREFIX + self.name

    @property
    def closed(self) -> bool:
        return self._fd == -1

    def add(self, step: AnyStep) -> int:
        """Write a step down before it is taken. Return its number."""
        self.append(step)
        self.steps.append(step)
        return len(self.steps) - 1

    def undone(self, *numbers: int) -> None:
        """Note that these steps were undone while later ones stand, or are not to be undone any more: all of them, or
        none."""
        self.append(*map(Undone, numbers))
        self._undone.update(numbers)

    def redone(self, number: int) -> None:
        """Note that step `number`, which was undone, is about to be taken again."""
        self.append(Redone(number))
        self._undone.discard(number)

    def released(self) -> list[tuple[int, AnyStep]]:
        """Return the steps that were undone out of order, oldest first."""
        return [(number, step) for number, step in enumerate(self.steps) if step is not None and number in self._undone]

    def standing(self) -> list[tuple[int, AnyStep]]:
        """Return the steps that still need to be undone, newest first."""
        return [(number, step) for number, step in reversed(list(enumerate(self.steps)))
                if step is not None and number not in self._undone]

    def origins(self) -> dict[int, Moved]:
        """Return the original cgroup of each process that was moved."""
        return {process.pid: process for step in self.steps if isinstance(step, Move) for process in step.processes}

    def keep(self, lifetime: Lifetime) -> None:
        """Note that the standing steps of this lifetime are not to be undone any more."""
        self.undone(*(number for number, step in self.standing() if step.lifetime is lifetime))

    def undo(self, context: StepContext, at: FaultPoint = no_fault) -> list[str]:
        """Undo the standing steps, newest first. Return one sentence for each failure. The entry is deleted if there is
        none.

        A tree that does not live yet, or is to be ended, is ended first. Otherwise the undo would move it home, where
        it would run.
        """
        origins, failures, needed = self.origins(), [], set[str]()
        for _, step in sorted(self.standing(), key=lambda one: not one[1].ends_tree):
            if step.makes in needed:
                continue
            try:
                at(f'undo-{step.point}')
                step.undo(context, origins)
            except (OSError, CkptError) as error:
                needed.update(step.needs)
                failures.append(f'cannot undo {step.describe()}: {error}')
        if not failures:
            self.finish()
        return failures

    def finish(self) -> None:
        """Delete the entry: everything is undone. A second call does nothing."""
        if not self.closed:
            self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd != -1:
            flock.close(fd)

    def append(self, *lines: AnyStep | Begin | Undone | Redone) -> None:
        """Write lines at once and fsync. CkptError if that fails; then nothing was added."""
        end = os.fstat(self._fd).st_size
        try:
            data = b''.join(map(_encode, lines))
            if end + len(data) > MAX_ENTRY:
                raise OSError(errno.EFBIG, 'too many processes for one journal entry')
            write_all(self._fd, data)
            os.fsync(self._fd)
        except OSError as error:
            # half a line would damage the next one
            os.ftruncate(self._fd, end)
            raise journal_failed(self.path, error) from error


def _encode(line: msgspec.Struct) -> bytes:
    try:
        return msgspec.json.encode(line) + b'\n'
    except UnicodeEncodeError:
        raise OSError(errno.EILSEQ, 'a name is not UTF-8') from None


def journal_failed(path: Path, error: OSError) -> CkptError:
    return CkptError(f'cannot write the freeze journal {path}: {error.strerror}', errno=error.errno, resource='journal',
                     phase='freeze', hint='choose another directory with --runtime DIR')
