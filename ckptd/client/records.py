# SPDX-License-Identifier: LGPL-2.1-or-later
"""Typed answers of ckptd, and the options that it takes. Times are microseconds, sizes bytes.

A field that a daemon does not send has its default; one that this client does not know is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, TypeVar

from ckptd.errors import Finding, finding_from

FreezeMode = Literal['auto', 'cgroup', 'unit', 'ptrace', 'caller']
After = Literal['resume', 'kill', 'freeze']
ChangedFiles = Literal['refuse', 'accept', 'rollback']
State = Literal['queued', 'running', 'done', 'failed', 'cancelled']
T = TypeVar('T')


class FreezeOptions(TypedDict, total=False):
    """freeze: what stops the tree. timeout: microseconds until it has to stand still. detach: go on when this client
    leaves the bus before it is over."""
    freeze: FreezeMode
    timeout: int
    detach: bool


class CheckpointOptions(FreezeOptions, total=False):
    """after: what becomes of the tree. save_files: keep what is open for writing, save_limit bytes in all. as_root: by
    the rights of root, although the tree is all one user's. handle_token: names the job's object."""
    after: After
    save_files: bool
    save_limit: int
    as_root: bool
    handle_token: str


class CheckRestoreOptions(TypedDict, total=False):
    """cgroup: where the tree is to live. new_pidns: in a pid namespace of its own. clamp: limits and priorities that
    may not be set come back as the nearest that may. leave_stopped: every process is stopped. changed_files: what to
    do about files that went on living. wait: the job ends with the root of the tree. terminal: an open fd of one, for
    a tree that had one."""
    cgroup: str
    new_pidns: bool
    clamp: bool
    leave_stopped: bool
    changed_files: ChangedFiles
    wait: bool
    terminal: int


class RestoreOptions(CheckRestoreOptions, total=False):
    """handle_token, detach: as of a checkpoint."""
    handle_token: str
    detach: bool


@dataclass(frozen=True, slots=True)
class CheckpointResult:
    """frozen_time: how long the tree stood still. freeze_mode: what stopped it. warnings: what the image lacks."""
    image: str = ''
    target: str = ''
    command: str = ''
    tasks: int = 0
    processes: int = 0
    size: int = 0
    freeze_mode: str = ''
    warnings: tuple[Finding, ...] = ()
    freezing_time: int = 0
    frozen_time: int = 0
    memdump_time: int = 0
    memwrite_time: int = 0
    total_time: int = 0
    pages_scanned: int = 0
    pages_written: int = 0


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """root: pid of the root as everybody sees it; inside: as its own pid namespace does, 0 if that is the same.
    exit_status: of the root as wait(2) has it, of a restore with wait; None of any other, and of a tree let go of."""
    image: str = ''
    root: int = 0
    inside: int = 0
    tasks: int = 0
    processes: int = 0
    bytes: int = 0
    cgroup: str = ''
    warnings: tuple[Finding, ...] = ()
    restored_usec: int = 0
    exit_status: int | None = None


@dataclass(frozen=True, slots=True)
class ManagerInfo:
    """jobs: how many wait or work. frozen_targets: what `thaw` would let go of."""
    version: str = ''
    spool: str = ''
    jobs: int = 0
    images: int = 0
    frozen_targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobInfo:
    id: int
    path: str
    operation: str
    target: str
    state: State


@dataclass(frozen=True, slots=True)
class JobStatus:
    """progress: 0 to 1. start_time, expected_end_time: of the real-time clock; 0 while unknown. error, result: {} until
    it has ended."""
    state: State = 'queued'
    phase: str = ''
    operation: str = ''
    target: str = ''
    image: str = ''
    root: int = 0
    tasks_done: int = 0
    tasks_total: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    progress: float = 0.0
    start_time: int = 0
    expected_end_time: int = 0
    started_by_uid: int = 0
    error: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """A line of the list. created: of the real-time clock. owner: a uid."""
    id: str
    path: str = ''
    target: str = ''
    command: str = ''
    created: int = 0
    owner: int = 0
    tasks: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class ImageDetails(ImageInfo):
    """All that is known without reading the image. statistics: times and pages of the checkpoint."""
    processes: int = 0
    kernel: str = ''
    architecture: str = ''
    boot_id: str = ''
    statistics: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task of a live tree or of an image, where every id is the tree's own. depth: of its process below the root.
    rss: bytes, and fds: 'FD LINK', of leaders only; fds_left_out: how many there was no room for."""
    tid: int
    tgid: int = 0
    ppid: int = 0
    pgid: int = 0
    sid: int = 0
    vtid: int = 0
    parent_tid: int = 0
    comm: str = ''
    state: str = ''
    depth: int = 0
    rss: int = 0
    uid: int = 0
    fds: tuple[str, ...] = ()
    fds_left_out: int = 0


@dataclass(frozen=True, slots=True)
class InhibitorInfo:
    """An inhibitor: the program that delays checkpoints, the target and the reason."""
    who: str
    why: str
    target: str
    uid: int
    pid: int


def from_row(cls: type[T], row: Mapping[str, Any]) -> T:
    """A record from a{sv}. TypeError for a row without what the record cannot do without."""
    known = {one.name for one in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: _plain(key, value) for key, value in row.items() if key in known})


def from_properties(cls: type[T], properties: Mapping[str, Any], **more: Any) -> T:
    """Make one from the properties of an object."""
    return from_row(cls, {snake(key): value for key, value in properties.items()} | more)


def snake(name: str) -> str:
    """'boot_id' for 'BootId', 'started_by_uid' for 'StartedByUID'."""
    return re.sub(r'(?<=[a-z])(?=[A-Z])', '_', name).lower()


def _plain(key: str, value: Any) -> Any:
    if key == 'warnings':
        return tuple(finding_from(row) for row in value)
    return tuple(value) if isinstance(value, list) else value
