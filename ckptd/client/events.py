# SPDX-License-Identifier: LGPL-2.1-or-later
"""The signals of ckptd as typed events. A job is named by the path of its object, an image by its id."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from ckptd.bus.client import ReceivedSignal
from ckptd.bus.names import JOB, MANAGER

__all__ = ['Event', 'ImageAdded', 'ImageRemoved', 'JobNew', 'JobRemoved', 'PrepareForCheckpoint', 'Progress',
           'Restored', 'Running', 'event_of']


@dataclass(frozen=True, slots=True)
class JobNew:
    """A job was queued or started."""
    id: int
    job: str


@dataclass(frozen=True, slots=True)
class JobRemoved:
    """A job has ended. result: 'done', 'failed' or 'cancelled'."""
    id: int
    job: str
    result: str


@dataclass(frozen=True, slots=True)
class ImageAdded:
    image: str
    path: str


@dataclass(frozen=True, slots=True)
class ImageRemoved:
    image: str
    path: str


@dataclass(frozen=True, slots=True)
class PrepareForCheckpoint:
    """A checkpoint of a tree that this client inhibits is about to begin (start), or is over."""
    job: str
    start: bool


@dataclass(frozen=True, slots=True)
class Restored:
    """A restored tree runs again."""
    image: str
    tasks: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a job."""
    job: str
    phase: str
    progress: float     # of the whole, 0 to 1
    bytes_done: int
    bytes_total: int    # 0 while unknown


@dataclass(frozen=True, slots=True)
class Running:
    """The tree of a restore runs. root: pid of its root."""
    job: str
    root: int


Event = (JobNew | JobRemoved | ImageAdded | ImageRemoved | PrepareForCheckpoint | Restored | Progress | Running)
_OF_MANAGER: Final[Mapping[str, type[Event]]] = {
    kind.__name__: kind for kind in (JobNew, JobRemoved, ImageAdded, ImageRemoved, PrepareForCheckpoint, Restored)}


def event_of(signal: ReceivedSignal) -> Event | None:
    """Convert a signal to an event. None for an unknown signal, such as one of a later daemon."""
    if signal.interface == MANAGER and signal.member in _OF_MANAGER:
        return _make(_OF_MANAGER[signal.member], signal.args)
    if signal.interface == JOB and signal.member == 'Progress':
        return _make(Progress, (signal.path, *signal.args))
    if signal.member == 'PropertiesChanged' and signal.args[0] == JOB and (root := signal.args[1].get('Root')):
        return Running(signal.path, root)
    return None


def _make(kind: type[Event], values: tuple[Any, ...]) -> Event | None:
    """Make an event. Additional arguments come from a later daemon and are ignored."""
    count = len(fields(kind))
    return kind(*values[:count]) if len(values) >= count else None
