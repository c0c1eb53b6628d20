# SPDX-License-Identifier: LGPL-2.1-or-later
"""Typed answers of ckptd, and its options. Times are in microseconds, sizes in bytes.

A field that a daemon does not send has its default. A field that this client does not know is left out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, TypeVar

from ckptd.errors import Finding, finding_from

FreezeMode = Literal['auto', 'cgroup', 'unit', 'ptrace', 'caller']
After = Literal['resume', 'kill', 'freeze']
ChangedFiles = Literal['refuse', 'accept', 'rollback']
State = Literal['queued', 'running', 'done', 'failed', 'cancelled']
T = TypeVar('T')


class FreezeOptions(TypedDict, total=False):
    """Options of Freeze."""
    freeze: FreezeMode    # what stops the tree
    timeout: int          # microseconds until the tree must be frozen
    detach: bool          # go on when this client leaves the bus before the job is over


class CheckpointOptions(FreezeOptions, total=False):
    """Options of Checkpoint."""
    after: After         # what happens to the tree afterwards
    force: bool          # kill the tree although a restore would be refused
    save_files: bool     # keep the content of files that are open for writing
    save_limit: int      # bytes of such content in all
    external: Sequence[str]     # policies for connections to the outside: '/run/app.sock:close'
    sysv: Sequence[str]         # System V objects to save, too: 'sem:ID', 'msg:ID' or 'ID'
    as_root: bool        # use root's rights although the whole tree belongs to one user
    handle_token: str    # name in the path of the job's object


class CheckRestoreOptions(TypedDict, total=False):
    """Options of CheckRestore."""
    cgroup: str                    # cgroup for the tree
    new_pidns: bool                # restore into a new pid namespace
    clamp: bool                    # limits and priorities that may not be set become the nearest that may
    force: bool                    # another instance of the unit may run
    leave_stopped: bool            # every process is stopped
    changed_files: ChangedFiles    # treatment of files that have changed since
    wait: bool                     # the job ends with the root of the tree
    inherit: Sequence[tuple[str, int]]  # peers of connections, each with an open fd of a socket that takes the place
    terminal: int | Literal['detach']   # an open fd of a terminal, for a tree that had one; or it gets none


class RestoreOptions(CheckRestoreOptions, total=False):
    """Options of Restore. handle_token and detach are those of Checkpoint."""
    handle_token: str
    detach: bool


class CheckOptions(TypedDict, total=False):
    """Options of Check, which mean what they do for Checkpoint."""
    freeze: FreezeMode
    external: Sequence[str]
    sysv: Sequence[str]
    as_root: bool


@dataclass(frozen=True, slots=True)
class CheckpointResult:
    """The result of a checkpoint."""
    image: str = ''
    target: str = ''
    command: str = ''
    tasks: int = 0
    processes: int = 0
    size: int = 0
    freeze_mode: str = ''                 # what stopped the tree
    warnings: tuple[Finding, ...] = ()    # what the image lacks
    freezing_time: int = 0
    frozen_time: int = 0                  # how long the tree was frozen
    memdump_time: int = 0
    memwrite_time: int = 0
    total_time: int = 0
    pages_scanned: int = 0
    pages_written: int = 0


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """The result of a restore."""
    image: str = ''
    root: int = 0      # pid of the root outside of its pid namespace
    inside: int = 0    # pid of the root in its own pid namespace; 0 if that is the same
    tasks: int = 0
    processes: int = 0
    bytes: int = 0
    cgroup: str = ''
    warnings: tuple[Finding, ...] = ()
    restored_usec: int = 0
    exit_status: int | None = None    # of the root, as wait(2) reports it; None without wait, and if the tree was
                                      # released


@dataclass(frozen=True, slots=True)
class ManagerInfo:
    """Properties of the manager."""
    version: str = ''
    spool: str = ''
    jobs: int = 0                           # number of jobs that are queued or running
    images: int = 0
    frozen_targets: tuple[str, ...] = ()    # targets that `thaw` would thaw


@dataclass(frozen=True, slots=True)
class JobInfo:
    id: int
    path: str
    operation: str
    target: str
    state: State


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Properties of a job."""
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
    progress: float = 0.0                               # 0 to 1
    start_time: int = 0                                 # of the real-time clock
    expected_end_time: int = 0                          # of the real-time clock; 0 while unknown
    started_by_uid: int = 0
    error: Mapping[str, Any] = field(default_factory=dict)  # {} until the job has ended
    result: Mapping[str, Any] = field(default_factory=dict)  # {} until the job has ended


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image in the list."""
    id: str
    path: str = ''
    target: str = ''
    command: str = ''
    created: int = 0    # of the real-time clock
    owner: int = 0      # a uid
    tasks: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class ImageDetails(ImageInfo):
    """Everything that is known without reading the image."""
    processes: int = 0
    kernel: str = ''
    architecture: str = ''
    boot_id: str = ''
    statistics: Mapping[str, int] = field(default_factory=dict)  # times and numbers of pages of the checkpoint


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task of a live tree or of an image. In an image, every id is the tree's own."""
    tid: int
    tgid: int = 0
    ppid: int = 0
    pgid: int = 0
    sid: int = 0
    vtid: int = 0
    parent_tid: int = 0
    comm: str = ''
    state: str = ''
    depth: int = 0               # of its process below the root
    rss: int = 0                 # bytes; of leaders only
    uid: int = 0
    fds: tuple[str, ...] = ()    # 'FD LINK'; of leaders only
    fds_left_out: int = 0        # how many there was no room for


@dataclass(frozen=True, slots=True)
class InhibitorInfo:
    """An inhibitor: the program that delays checkpoints, the target and the reason."""
    who: str
    why: str
    target: str
    uid: int
    pid: int


def from_row(cls: type[T], row: Mapping[str, Any]) -> T:
    """Make a record from a{sv}. TypeError if a required field is missing."""
    known = {one.name for one in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: _plain(key, value) for key, value in row.items() if key in known})


def from_properties(cls: type[T], properties: Mapping[str, Any], **more: Any) -> T:
    """Make a record from the properties of an object."""
    return from_row(cls, {snake(key): value for key, value in properties.items()} | more)


def snake(name: str) -> str:
    """Return 'boot_id' for 'BootId', 'started_by_uid' for 'StartedByUID'."""
    return re.sub(r'(?<=[a-z])(?=[A-Z])', '_', name).lower()


def _plain(key: str, value: Any) -> Any:
    if key == 'warnings':
        return tuple(finding_from(row) for row in value)
    return tuple(value) if isinstance(value, list) else value
