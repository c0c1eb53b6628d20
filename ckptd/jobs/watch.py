# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notice images that other processes add to or remove from the spool: another daemon, or rm."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptd.image.ids import is_image_id
from ckptd.kernel import inotify

log = logging.getLogger(__name__)

# an image appears and disappears by rename; the other two events come from rm and cp
MASK = inotify.IN_MOVED_TO | inotify.IN_MOVED_FROM | inotify.IN_CREATE | inotify.IN_DELETE
SELF = inotify.IN_DELETE_SELF | inotify.IN_MOVE_SELF | inotify.IN_Q_OVERFLOW


class SpoolWatch:
    """A context in which `changed` is called for changes of the spool. Without inotify (it has limits per user) a
    daemon notices only its own changes."""

    def __init__(self, directory: Path, changed: Callable[[], None]) -> None:
        self._directory, self._changed = directory, changed
        self._loop = asyncio.get_running_loop()
        self._inotify: inotify.Inotify | None = None

    def __enter__(self) -> Self:
        try:
            watch = inotify.Inotify()
        except OSError as error:
            log.warning('cannot watch %s: changes by other processes will not be noticed: %s', self._directory, error)
            return self
        self._inotify = watch
        watch.add(self._directory, MASK | inotify.IN_DELETE_SELF | inotify.IN_MOVE_SELF | inotify.IN_ONLYDIR)
        self._loop.add_reader(watch.fd, self._read, watch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._inotify is not None:
            self._loop.remove_reader(self._inotify.fd)
            self._inotify.close()

    def _read(self, watch: inotify.Inotify) -> None:
        if any(event.mask & SELF or is_image_id(event.name) for event in watch.read()):
            self._changed()
