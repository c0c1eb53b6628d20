# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of an attribute. Attributes are the kernel's state of a task except its memory and its open files.

An attribute is one class in a file of this package, found by registry.py. No other module names it. Its hooks in life
order:

    findings(task, status)      reasons why a task cannot be dumped, seen from outside before the freeze
    lend(status, tracee)        prepares a stopped task for calls that it makes for us; undone when the tracer detaches
    ask(batch)                  adds calls to the one batch of a stopped task; returns a reader of the answer
    ask_more(tid, mappings)     further batches, for objects of which a process has any number
    look(tracee)                reads the answer from outside, with /proc and ptrace(2)
    require(task, answer)       refuses what cannot be saved and only the stopped task shows
    dump(of, answer)            the data for the image; None if the task has the values of a new task
    dump_dead(task, status)     likewise for a zombie

One of `ask`, `ask_more` and `look` gives the answer. Each of them is done while the tree stands still, so it only
collects. `dump` sees no task: it is done when the tree runs again.

For a restart:

    obstacles(record, ...)      reasons why it cannot be set again, or what will be lost; changes nothing
    restore(record, to)         calls of the stub, or of ours from outside, at the attribute's stage
    finish(record, tracee)      state that the tracer sets when the task is no longer a stub
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, get_args, get_origin

from ckptd.errors import Finding, Severity
from ckptd.image.grammar import Struct
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.kernel import maps
from ckptd.kernel.creds import UserIds
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
Fields: TypeAlias = Mapping[str, Any]       # fields of a record of the image that several attributes fill


class Stage(IntEnum):
    """The stage of a restart at which an attribute is set. Within a stage Scope decides; attributes have no other
    order."""
    BORN = 1            # when the task is made, before it makes others, which inherit it
    SESSION = 2         # when a leader has begun its session, before it makes others in it
    MEMORY = 3          # address spaces (restore/memory.py)
    FILES = 4           # open files (restore/files.py)
    ATTRIBUTES = 5      # with the rights of the restart, and with the service fds
    LIMITS = 6          # limits of a process, then settings of its threads within these
    RIGHTS = 7          # the shed (restore/shed.py)
    AFTER_RIGHTS = 8    # state through which memory of the program steers, and state that a change of ids resets
    FILTERS = 9         # the last calls of a stub


class Scope(IntEnum):
    """The owner of an attribute: the numbers of TaskAttribute.scope. A stage of a task handles them in this order."""
    MM = 1
    SIGHAND = 2
    FS = 3
    PROCESS = 4
    THREAD = 5


# mm_id, sighand_id, fs_id, vpid: the objects that this task answers or acts for
Owners: TypeAlias = Mapping[Scope, int]


@dataclass(frozen=True, slots=True)
class DumpedProcess:
    """A process as it was when it stood still."""
    leader: Task
    stat: Stat
    pending: tuple[bytes, ...]    # siginfo_t queued to the process
    vtids: Mapping[int, int]      # vtid by tid, of the whole tree
    groups: Mapping[int, int]     # vpgid by pgid, of the whole tree


@dataclass(frozen=True, slots=True)
class DumpedTask:
    """A thread as it was when it stood still. For state of a process, it is the thread that was asked. pending:
    siginfo_t queued to the thread."""
    task: Task
    status: Status
    pending: tuple[bytes, ...]
    process: DumpedProcess


class CallerIds(UserIds, Protocol):
    """The caller of a restart. capabilities, bounding: masks, -1 if unknown."""

    @property
    def capabilities(self) -> int: ...
    @property
    def bounding(self) -> int: ...


class RestartRights(Protocol):
    """The rights of a restart. own: our own process, from which every restored task descends."""

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
        """Whether an ordinary user's worker makes the tree, with CAP_CHECKPOINT_RESTORE only."""

    def capable(self, capability: int) -> bool:
        """Whether the caller has a capability."""

    def beyond(self, obstacle: Finding, comes: str) -> Finding:
        """Refuse a value that may not be set, or warn if the caller accepts the nearest. comes: the nearest."""


@dataclass(frozen=True, slots=True)
class RestoreMeans:
    """The means of a restart for attributes. The fds are those of stubs until Stage.LIMITS."""
    reader: ImageReader
    allowed: Allowed
    directory: Callable[[str], int]
    terminal: Callable[[int], int]  # the terminal of a session, -1 for none
    sets_ids: bool
    is_users_worker: bool
    warn: Callable[[Finding], None]


@dataclass(frozen=True, slots=True)
class RestoredTask:
    """A stub that gets its attributes. `script` collects its calls."""
    task: ImageTask
    stub: Stub
    script: Script
    means: RestoreMeans
    pgid: int    # of the process as it is made
    sid: int     # of the process as it is made

    @property
    def vpid(self) -> int:
        return self.task.vpid

    @property
    def tid(self) -> int:
        return self.stub.tid


class Attribute(ABC, Generic[R, A]):
    """An attribute: `class Personality(Attribute[Value, None], name='personality', scope=Scope.PROCESS,
    stage=Stage.ATTRIBUTES)`.

    R is the data in the image: a record of image.records with the id of the owner as its first field, or a layout of
    this file, which is stored in a TaskAttribute. A is the answer. name: in images, never changes.
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

    def lend(self, status: Status, tracee: Tracee) -> None:
        return

    def ask(self, batch: Batch) -> Reader[A] | None:
        return None

    def ask_more(self, tid: int, mappings: Sequence[maps.Mapping]) -> Generator[Batch, Results, A] | None:
        return None

    def look(self, tracee: Tracee) -> A | None:
        return None

    def require(self, task: Task, answer: A) -> None:
        """Check that the state can be saved. NotSupported."""

    @abstractmethod
    def dump(self, of: DumpedTask, answer: A) -> R | Fields | None: ...

    def dump_dead(self, task: Task, status: Status) -> R | None:
        return None

    def obstacles(self, record: R, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        return ()

    def restore(self, record: R, to: RestoredTask) -> Steps[None] | None:
        """Set the attribute. Steps are needed only if a call must be made before the next one is known."""
        return None

    def finish(self, record: R, tracee: Tracee) -> None:
        return


def about(vpid: int, resource: str, errno: str, reason: str, hint: str, severity: Severity = 'refusal') -> Finding:
    """Make a finding about a task of the image, before the name of its program is known. vpid: 0 for the tree as a
    whole."""
    return Finding(vpid, '', resource, errno, reason, hint, severity)
