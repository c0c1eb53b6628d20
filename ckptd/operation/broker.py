# SPDX-License-Identifier: LGPL-2.1-or-later
"""The worker's end of the broker's calls. An error of the broker is raised here again."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from ckptd.errors import CkptError
from ckptd.image.manifest import Manifest
from ckptd.image.source import GivenFiles
from ckptd.image.writer import write_manifest
from ckptd.journal.steps import LinkFile, RestartStep, TakeFromTerminal, TakeStep, WalkQueues
from ckptd.kernel.timer_list import End
from ckptd.objects.files.base import OpenFile
from ckptd.protocol.broker_calls import (
    EndTaken,
    EndWalk,
    FindWatched,
    KeepContent,
    NewImage,
    NoteStep,
    NoteTaken,
    NoteWalk,
    OpenImage,
    Placed,
    PlaceTree,
    Publish,
    ReadTimers,
    StartTree,
    StopUnit,
)
from ckptd.protocol.channel import Channel


class BrokerClient:
    """The broker of this worker's job."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def open_image(self) -> GivenFiles:
        """Open the files of the job's image. NoSuchImage, PermissionDenied, ImageDamaged."""
        found: dict[str, int] = {}
        while True:
            value, fds = self._channel.call(OpenImage(len(found)))
            found |= dict(zip(value['names'], fds, strict=True))
            if not value['more']:
                return GivenFiles(found)

    def new_image(self, image: str, size: int = 0) -> 'LentDirectory':
        """Make a directory for a new image. SpoolFailed."""
        value, [fd] = self._channel.call(NewImage(image, size))
        return LentDirectory(fd, str(value['image']), self._channel)

    def place_tree(self, processes: Sequence[Placed]) -> None:
        self._channel.call(PlaceTree(tuple(processes)))

    def start_tree(self) -> list[str]:
        """Start the tree. Return warnings, one sentence each."""
        value, _ = self._channel.call(StartTree())
        return list(value['warnings'])

    def stop_unit(self) -> None:
        """Have the unit of the tree stopped. CkptError of its manager."""
        self._channel.call(StopUnit())

    def note(self, step: RestartStep | LinkFile) -> None:
        self._channel.call(NoteStep(step))

    @contextmanager
    def walking(self, step: WalkQueues) -> Iterator[None]:
        """Have the broker set the old offsets if this worker dies in the block."""
        self._channel.call(NoteWalk(step))
        yield
        self._channel.call(EndWalk())

    @contextmanager
    def taking(self) -> Iterator[Callable[[TakeStep], None]]:
        """Have the broker put back what was taken out of the tree, unless the block ends normally."""
        noted: list[TakeStep] = []

        def note(step: TakeStep) -> None:
            assert isinstance(step, TakeFromTerminal), 'the other steps take root'
            self._channel.call(NoteTaken(step))
            noted.append(step)
        yield note
        if noted:
            self._channel.call(EndTaken())

    def watched_paths(self, file: OpenFile, tid: int) -> Mapping[int, str]:
        """Return paths of watched files, see objects.files.tables.JobTables. OSError of the broker."""
        found: dict[int, str] = {}
        after = 0
        while True:
            try:
                value, _ = self._channel.call(FindWatched(file.tid, file.fd, tid, after))
            except CkptError as error:
                raise OSError(error.errno or errno.EIO, error.message) from error
            found |= {wd: os.fsdecode(path) for wd, path in value['paths']}
            if not (after := value['more']):
                return found

    def keep_content(self) -> tuple[str, int]:
        """Make an empty file for the content of another one. Return its path and fd. SpoolFailed."""
        value, [fd] = self._channel.call(KeepContent())
        return str(value['path']), fd

    def timers(self) -> 'LentTimers':
        return LentTimers(self._channel)


class LentTimers:
    """The timers of the machine, see operation.timers.Timers. The broker reads them, and returns only those that come
    and go with tasks of the job."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def at_rest(self) -> None:
        try:
            self._channel.call(ReadTimers())
        except CkptError as error:
            if error.errno == errno.ENOENT:     # the kernel has no such list
                raise FileNotFoundError(error.errno, str(error)) from error
            raise

    def asleep(self, tids: Sequence[int]) -> None:
        self._channel.call(ReadTimers(tuple(tids)))

    def ends(self) -> set[End]:
        value, _ = self._channel.call(ReadTimers())
        return {End(*end) for end in value['ends']}


class LentDirectory:
    """A directory below the spool that only this worker can reach, see image.writer.Destination."""

    def __init__(self, fd: int, image: str, channel: Channel) -> None:
        self._fd, self.image, self._channel = fd, image, channel
        self.path = Path(f'/proc/self/fd/{fd}')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write_manifest(self, manifest: Manifest) -> None:
        write_manifest(self.path, manifest)

    def show(self) -> None:
        """Let the broker publish the image. SpoolFailed."""
        self._channel.call(Publish())
        self.abort()

    def abort(self) -> None:
        """Close the directory. The broker removes an unpublished image."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
