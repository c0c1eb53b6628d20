# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of a kind of open file.

A kind is one class in one file of this package, found by registry.py. No other module names it. The hooks in life
order, none of which affects the task, except `die`:

    matches(file)       is this open file of my kind? At most one kind says yes
    findings(file)      reasons why it cannot be dumped, or what will be lost
    endpoint(file)      its connection to other open files, such as the two ends of a pipe
    peek_offset(file)   the state that walking its queue changes for a moment
    discover(file)      open files that are in no fd table: they are in its queue
    link(ends)          when all are known: ends whose other ends are outside of the tree
    inherited(file)     the name under which the caller of a restart gives the file, if a policy says so
                        (ckptd.external). Then no other kind than inherited.py knows of it from here on
    dump(file, content) the record that is kept; bulk bytes are given to `content`
    take(record, file, content)
                        last of all, if the tree is killed then: the record with data that can only be taken out of the
                        kernel. It is noted in a journal, which puts it back if the tree lives on
    die(file)           the image is safe, and the tree is about to be killed: change the file so that its end leaves
                        nothing in the kernel that would hinder a restart. Called only if the tree is to be killed
    leaves(record)      whether `take` has made something that lasts outside of the image
    forget(record)      the image of root is removed: remove that, if no restart has

and for a restart, where `saved` has the common data of all kinds (image.records.SavedFile):

    restart_findings(record, saved, lookup)  reasons why it cannot be opened again, or losses; changes nothing
    references(record)                   ids of other open files that it needs
    sessions(record)                     vpids of session leaders that it gives a controlling terminal. `create` keeps
                                         that for them, as ctx.once(('terminal', vpid), ...)
    needs(record, saved)                 memory and other space that is needed to make it again
    late(record, saved)                  whether it can be opened only when the tasks exist
    create(record, saved, ctx)           a new description: an fd with the access mode and flags of `saved.flags`
    opened(record, saved, fd, ctx)       what needs all files to be open, and tasks that have all rights of the restart
    connect(record, saved, fd, ctx)      everything that needs the tasks, or the other files: locks, data in flight
    watch(record, saved, fd, ctx)        everything that depends on the data of other files, which is in place by then:
                                         the entries of an epoll
    commit(record, saved, fd, ctx)       everything that cannot be undone, done when nothing else can fail
    arm(record, saved, fd, ctx)          the last step before the tasks run: begin to watch other files, which only the
                                         tasks have open by then. It must not fail
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, get_args, get_origin

from ckptd.errors import Finding, Severity
from ckptd.image.grammar import Struct
from ckptd.image.records import Extent, SavedFile
from ckptd.journal.steps import TakeStep
from ckptd.objects.files.open_file import DELETED, OpenFile, Owner, read_open_file
from ckptd.objects.files.restoring import (
    ByUser,
    ChangedFiles,
    FileLookup,
    FileMaking,
    InheritedFiles,
    Maker,
    RestoreContext,
)
from ckptd.objects.files.tables import JobTables

# re-exported, so that kinds import all common names from here
__all__ = ['DELETED', 'ByUser', 'ChangedFiles', 'FileLookup', 'FileMaking', 'InheritedFiles', 'Maker', 'OpenFile',
           'Owner', 'RestoreContext', 'read_open_file']

if TYPE_CHECKING:
    from ckptd.objects.files.content import ContentSegment

R = TypeVar('R', bound=Struct)

_OF_PROCESS = re.compile(r'/proc/(\d{1,10})(?:/|$)')
_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
O_LARGEFILE = 0o100000      # of the kernel; it is 0 in C libraries for 64 bit
# fcntl(2), F_GETFL
_OF_OPEN_FILES = (os.O_ACCMODE | os.O_APPEND | os.O_ASYNC | os.O_DIRECT | os.O_DIRECTORY | os.O_NOATIME | os.O_NOFOLLOW
                  | os.O_NONBLOCK | os.O_PATH | os.O_SYNC | O_LARGEFILE)
# flags that open(2) of a magic link rejects, because it is a link; and O_ASYNC, which only F_SETFL sets (open(2))
_NOT_AGAIN = os.O_NOFOLLOW | os.O_ASYNC | os.O_CREAT | os.O_EXCL | os.O_TRUNC


class Content(Protocol):
    """The image that files are dumped into."""

    def add(self, chunks: Iterable[bytes]) -> Extent:
        """Write bulk bytes into a page-aligned extent of the image's data file."""
        ...

    def shared_memory(self, file: OpenFile) -> int:
        """Return the shm_id of a memfd's object, which is dumped once, mapped or not."""
        ...

    def written(self, file: OpenFile) -> bool:
        """Whether the tree has the file open for writing, by this description or another one."""
        ...

    def reads(self, file: OpenFile) -> bool:
        """Whether the tree, or the user who asked for the checkpoint, may read the file, by this description or another
        one. A file that should be kept but may not be read is noted."""
        ...

    def save(self, file: OpenFile) -> 'tuple[ContentSegment, ...] | None':
        """Save the data of a named file, once for all its descriptions. None if it is not to be kept."""
        ...

    def link_back(self, file: OpenFile) -> str:
        """Give a deleted file that has another name a new one and return its path, see linked.py. CkptError."""
        ...

    def file_id(self, fd: int) -> int:
        """Return the id of the description behind an fd of ours. It is dumped like those of the tasks."""
        ...

    def found(self, tid: int, fd: int) -> tuple[int, OpenFile] | None:
        """Return the description behind an fd of a task of the tree, with its id."""
        ...

    def every(self) -> Iterable[tuple[int, OpenFile]]:
        """Yield all descriptions of the tree with their ids. For a kind that is `last` those in flight are among
        them."""
        ...

    @property
    def is_taken(self) -> bool:
        """Whether the tree is killed once it is in the image, so that `take` follows."""
        ...

    def note(self, step: TakeStep) -> None:
        """Write down what `take` does, before and after."""
        ...

    def vpid(self, pid: int) -> int:
        """Return the pid of a process of the tree in its own pid namespace; 0 for a process outside of the tree."""
        ...


def open_again(fd: int, flags: int) -> int:
    """Open a further description of an open file (proc_pid_fd(5)), even of a pipe, FIFO, memfd or deleted file. A
    terminal does not become the controlling one of a worker, which is a session leader."""
    return os.open(f'/proc/self/fd/{fd}', opening(flags) & ~_NOT_AGAIN | os.O_CLOEXEC | os.O_NOCTTY)


def opening(flags: int) -> int:
    """Return the flags of an open file in the form for open(2) of an existing one. O_TMPFILE, which stays set, would
    make a file, and an image may not set flags that no open file has."""
    return flags & _OF_OPEN_FILES & ~(os.O_TMPFILE if flags & _TMPFILE else 0)


def of_process(path: str) -> bool:
    """Whether the path is /proc/PID or below it, so that it exists once the process does."""
    found = _OF_PROCESS.match(path)
    return found is not None and int(found[1]) > 0


def access_of(flags: int) -> int:
    """Return os.R_OK and os.W_OK for an access mode."""
    return {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(flags & os.O_ACCMODE, os.R_OK | os.W_OK)


def finding(errno: str, reason: str, hint: str, severity: Severity = 'refusal') -> Finding:
    """Make a finding about an open file. The caller adds the task and the fd. errno: a name, 'EOPNOTSUPP'."""
    return Finding(0, '', '', errno, reason, hint, severity)


class Needs(NamedTuple):
    """The resources needed to make a file again."""
    key: Hashable      # equal for all descriptions of the file, which is made once
    memory: int = 0    # bytes of memory that is filled
    pipe: int = 0      # bytes of the capacity of a pipe
    disk: int = 0      # bytes on the file system of the directory in which the deleted file `path` is made
    path: str = ''


class Endpoint(NamedTuple):
    """One end of an object with several ends."""
    key: tuple[str, int, int]    # equal for all ends of one object
    holds: frozenset[str]        # the ends that this open file is: 'read', 'write'
    lacks: frozenset[str]        # the ends that are open elsewhere and that this file is not


class FileEnd(NamedTuple):
    """An open file that is an end of an object. fd: in the table of task `file.tid`."""
    file: OpenFile
    endpoint: Endpoint


class Kind(ABC, Generic[R]):
    """One kind of open file: `class PipeKind(Kind[Pipe], tag='pipe')`. R is the record that dump() makes.

    The class is the rule, an instance is the state of one job. tag: the kind's name in images, which never changes.
    record: R, to decode the result of dump(). alike: files of equal link, inode, mode, flags and locks have equal
    findings. last: they are dumped when all others are, so all descriptions are known.
    """
    tag: ClassVar[str]
    record: ClassVar[type[Struct]]
    alike: ClassVar[bool]
    last: ClassVar[bool]

    def __init_subclass__(cls, *, tag: str, alike: bool = True, last: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.tag, cls.alike, cls.last = tag, alike, last
        cls.record = next(get_args(base)[0] for base in cls.__orig_bases__  # type: ignore[attr-defined]
                          if get_origin(base) is Kind)

    def __init__(self, tables: JobTables) -> None:
        self._tables = tables

    @abstractmethod
    def matches(self, file: OpenFile) -> bool: ...

    def findings(self, file: OpenFile) -> list[Finding]:
        return []

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        return None

    def peek_offset(self, file: OpenFile) -> int | None:
        """SO_PEEK_OFF of a file whose queue `discover` is going to walk; None if there is nothing to walk."""
        return None

    def discover(self, file: OpenFile) -> Sequence[int]:
        """Return fds of ours, duplicates of the files in the file's queue. `close` closes them."""
        return ()

    def link(self, ends: Sequence[FileEnd], *, is_whole: bool) -> Iterator[tuple[FileEnd, Finding]]:
        """Yield findings about ends that lack their other ends. is_whole: the tree is at rest, and files in flight have
        been discovered."""
        held: dict[Hashable, set[str]] = {}
        for end in ends:
            held.setdefault(end.endpoint.key, set()).update(end.endpoint.holds)
        told: set[Hashable] = set()
        for end in ends:
            key = end.endpoint.key
            missing = end.endpoint.lacks - held[key]
            if missing and key not in told:
                told.add(key)
                yield end, finding('EPIPE', f'the {min(missing)} end of {end.file.link} is held outside of the tree',
                                   'a restart cannot join it to that process again', 'warning')

    def inherited(self, file: OpenFile) -> str:
        return ''

    @abstractmethod
    def dump(self, file: OpenFile, content: Content) -> R: ...

    def take(self, record: R, file: OpenFile, content: Content) -> R:
        return record

    def die(self, file: OpenFile) -> None:
        """Prepare the end of the file. It must not fail."""
        return

    def leaves(self, record: R) -> bool:
        return False

    def forget(self, record: R) -> None:
        return

    def close(self) -> None:
        """Close the files that the kind has opened for itself."""

    def references(self, record: R) -> Iterable[int]:
        return ()

    def restart_findings(self, record: R, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        return []

    def sessions(self, record: R) -> Iterable[int]:
        return ()

    def needs(self, record: R, saved: SavedFile) -> Needs | None:
        return None

    def late(self, record: R, saved: SavedFile) -> bool:
        return False

    @abstractmethod
    def create(self, record: R, saved: SavedFile, ctx: RestoreContext) -> int: ...

    def opened(self, record: R, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        return

    def connect(self, record: R, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        return

    def watch(self, record: R, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        return

    def commit(self, record: R, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        return

    def arm(self, record: R, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        return
