# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notices images that come and go in the spool by other hands: another daemon's, or rm's."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptd.image.ids import is_image_id
from ckptd.kernel import inotify

log = logging.getLogger(__name__)

# an image appears and goes by rename; somebody's rm or cp makes the other two
MASK = inotify.IN_MOVED_TO | inotify.IN_MOVED_FROM | inotify.IN_CREATE | inotify.IN_DELETE
SELF = inotify.IN_DELETE_SELF | inotify.IN_MOVE_SELF | inotify.IN_Q_OVERFLOW


class SpoolWatch:
    """Calls `changed` while it is entered. Without inotify (its limits are per user) a daemon still sees its own."""

    def __init__(self, directory: Path, changed: Callable[[], None]) -> None:
        self._directory, self._changed = directory, changed
        self._loop = asyncio.get_running_loop()
        self._inotify: inotify.Inotify | None = None

    def __enter__(self) -> Self:
        try:
            watch = inotify.Inotify()
        except OSError as error:
            log.warning('images of others in %s will not be noticed: %s', self._directory, error)
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
