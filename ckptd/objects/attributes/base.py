# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of an attribute: of what the kernel keeps for a task besides its memory and its open files.

An attribute is one class in a file of this package, found by registry.py; nobody else names it. Its hooks, in life
order:

    findings(task, status)      why a task cannot be dumped, seen from outside before the freeze
    ask(batch)                  adds calls to the batch that a stopped task does anyway; returns how to read the answer
    ask_more(tid)               further batches, for what a process has any number of
    dump(of, answer)            what the image keeps; None if the task has what a new task has
    dump_dead(task, status)     the same of a zombie

and of a restart:

    obstacles(record, ...)      why it cannot be set again, or what it will lack; changes nothing
    restore(record, to)         calls of the stub, or of ours from outside, at the attribute's stage
    finish(record, tracee)      what the tracer sets when the task is no stub any more
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, get_args, get_origin

from ckptd.errors import Finding, Severity
from ckptd.image.grammar import Struct
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.stat import Stat
from ckptd.kernel.status import Status
from ckptd.objects.attributes.allowed import Allowed
from ckptd.remote.batch import Batch, Results
from ckptd.remote.interleave import Steps
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub
from ckptd.tree import Task

R = TypeVar('R', bound=Struct)
A = TypeVar('A')
Reader: TypeAlias = Callable[[Results], A]
Fields: TypeAlias = Mapping[str, Any]       # of a record of the image that several attributes fill


class Stage(IntEnum):
    """When a restart sets an attribute. Nothing else orders attributes, but that within a stage Scope does."""
    BORN = 1            # when the task is made, and before it makes others, which inherit it
    MEMORY = 2          # address spaces, restore/memory.py
    FILES = 3           # open files, restore/files.py
    ATTRIBUTES = 4      # with the rights of the restart, and with the service fds
    LIMITS = 5          # what bounds a process, then what its threads may have within that
    RIGHTS = 6          # the shed, restore/shed.py
    AFTER_RIGHTS = 7    # what memory of the program steers, and what a change of ids resets
    FILTERS = 8         # the last calls of a stub


class Scope(IntEnum):
    """Owners of attributes, by the numbers of TaskAttribute.scope. A stage of a task takes them in this order."""
    MM = 1
    SIGHAND = 2
    FS = 3
    PROCESS = 4
    THREAD = 5


Owners: TypeAlias = Mapping[Scope, int]     # mm_id, sighand_id, fs_id, vpid: of what this task speaks or acts for


@dataclass(frozen=True, slots=True)
class DumpedProcess:
    """A stopped process. pending: siginfo_t queued to the process. vtids: vtid by tid; groups: vpgid by pgid; of the
    whole tree."""
    leader: Task
    stat: Stat
    pending: tuple[bytes, ...]
    vtids: Mapping[int, int]
    groups: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class DumpedTask:
    """A stopped thread; for what a process has, the thread that was asked. pending: siginfo_t queued to the thread."""
    task: Task
    tracee: Tracee
    status: Status
    pending: tuple[bytes, ...]
    process: DumpedProcess

    @property
    def tid(self) -> int:
        return self.task.tid


class CallerIds(Protocol):
    """The caller of a restart. capabilities, bounding: masks, -1 if unknown."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def groups(self) -> tuple[int, ...]: ...
    @property
    def capabilities(self) -> int: ...
    @property
    def bounding(self) -> int: ...


class RestartRights(Protocol):
    """Rights of a restart. own: our own process, which every restored task descends from."""

    @property
    def reader(self) -> ImageReader: ...
    @property
    def caller(self) -> CallerIds: ...
    @property
    def own(self) -> Status: ...
    @property
    def allowed(self) -> Allowed: ...

    @property
    def in_user_namespace(self) -> bool:
        """Whether the tree gets a user namespace of its own."""

    @property
    def is_users_worker(self) -> bool:
        """Whether an ordinary user's worker makes the tree, with CAP_CHECKPOINT_RESTORE alone."""

    def capable(self, capability: int) -> bool:
        """Whether the caller has a capability."""

    def beyond(self, obstacle: Finding, comes: str) -> Finding:
        """Refuse a value that may not be set, or warn if the caller accepts the nearest. comes: the nearest."""


@dataclass(frozen=True, slots=True)
class RestoreMeans:
    """Means of a restart to set attributes. directory: an fd by path; terminal: the fd of the caller's terminal, -1
    for none. Stubs have both fds until Stage.LIMITS. sets_ids: False where a user namespace has only one uid and gid.
    is_users_worker: see RestartRights.
    warn: told what was lost, where no check could know."""
    reader: ImageReader
    allowed: Allowed
    directory: Callable[[str], int]
    terminal: Callable[[], int]
    sets_ids: bool
    is_users_worker: bool
    warn: Callable[[Finding], None]


@dataclass(frozen=True, slots=True)
class RestoredTask:
    """A stub that is given its attributes. `script` collects its calls. pgid, sid: of the process as it is made."""
    task: ImageTask
    stub: Stub
    script: Script
    means: RestoreMeans
    pgid: int
    sid: int

    @property
    def vpid(self) -> int:
        return self.task.vpid

    @property
    def tid(self) -> int:
        return self.stub.tid


class Attribute(ABC, Generic[R, A]):
    """An attribute: `class Personality(Attribute[Value, None], name='personality', scope=Scope.PROCESS,
    stage=Stage.ATTRIBUTES)`.

    R is what the image keeps: a record of image.records with the id of the owner as its first field, or a layout of
    this file, which is kept in a TaskAttribute. A is the answer to `ask`. name: in images, for ever.
    """
    name: ClassVar[str]
    scope: ClassVar[Scope]
    stage: ClassVar[Stage]
    record: ClassVar[type[Struct]]

    def __init_subclass__(cls, *, name: str = '', scope: Scope = Scope.THREAD, stage: Stage = Stage.ATTRIBUTES,
                          **more: Any) -> None:
        super().__init_subclass__(**more)
        if name:
            cls.name, cls.scope, cls.stage = name, scope, stage
        for base in getattr(cls, '__orig_bases__', ()):
            if get_origin(base) is Attribute:
                cls.record = get_args(base)[0]

    def findings(self, task: Task, status: Status) -> list[Finding]:
        return []

    def ask(self, batch: Batch) -> Reader[A] | None:
        return None

    def ask_more(self, tid: int) -> Generator[Batch, Results, A] | None:
        return None

    @abstractmethod
    def dump(self, of: DumpedTask, answer: A) -> R | Fields | None: ...

    def dump_dead(self, task: Task, status: Status) -> R | None:
        return None

    def obstacles(self, record: R, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        return ()

    def restore(self, record: R, to: RestoredTask) -> Steps[None] | None:
        """Steps only where a call must be done before the next one is known."""
        return None

    def finish(self, record: R, tracee: Tracee) -> None:
        return


def about(vpid: int, resource: str, errno: str, reason: str, hint: str, severity: Severity = 'refusal') -> Finding:
    """A finding about a task of the image, before the name of its program is known. vpid: 0 for the tree as a whole."""
    return Finding(vpid, '', resource, errno, reason, hint, severity)
