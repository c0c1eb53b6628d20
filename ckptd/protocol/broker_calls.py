# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of a worker to its broker: one message each, answered by an Answer.

    call            answer                          checked by the broker
    OpenImage       names; fds of the files         the image is the job's and its owner the user; regular files
    NewImage        image; fd of its directory      one a job; of the user's, below the spool, which only root can enter
    Publish         the manifest                    names, types, sizes and link counts; all is root's again before
    FreezeTree      mode, moved                     every uid of every task is the user's, before and after
    LetRun, HoldTree, RestoreTree                   the tree that FreezeTree froze
    EndTree         -                               the same; its image is published, every uid still the user's
    ReadTimers      ends of sleeps                  tasks that the worker traces and that sleep; what came and went with
                                                    them
    PlaceTree       -                               stubs: traced by the worker, younger than it, the user's uids
    StartTree       -                               after PlaceTree; from here on the tree lives
    Note            -                               a file or segment that the worker makes, for whoever undoes it
    KeepContent     path; fd of an empty file       for what a rollback overwrites
"""

import msgspec

from ckptd.journal.steps import Count, KeepFile, MakeFile, MakeSegment, Pid
from ckptd.protocol.messages import FreezeMode, FromWorker, Message


class OpenImage(Message, frozen=True):
    """Open the files of the image, MAX_FILES at a time, from number `first` on."""
    first: int = 0


class NewImage(Message, frozen=True):
    """Make the directory that the image is written to. image: the id of one that is imported, a similar one will be its
    own; size: its bytes."""
    image: str = ''
    size: Count = 0


class Publish(Message, frozen=True):
    """Make the image visible. Its manifest is among the files; what it says of owner, id and origin does not count."""


class FreezeTree(Message, frozen=True):
    """Bring the job's tree to rest. remote_calls: it must be able to run for its tracer."""
    mode: FreezeMode
    remote_calls: bool


class LetRun(Message, frozen=True):
    """Thaw the tree, whose tasks are all stopped by their tracer."""


class HoldTree(Message, frozen=True):
    """Freeze again what LetRun has thawed."""


class RestoreTree(Message, frozen=True):
    """Bring back the state that was found."""


class EndTree(Message, frozen=True):
    """The worker ends the tree now; what it leaves alive, the broker or a recovery ends."""


class ReadTimers(Message, frozen=True):
    """Read /proc/timer_list, while no task of the job sleeps, or while these do."""
    asleep: tuple[Pid, ...] = ()


class Placed(msgspec.Struct, array_like=True, frozen=True):
    """A process that was restored: its pid, and the cgroup that it was in."""
    pid: Pid
    cgroup: str


class PlaceTree(Message, frozen=True):
    """Put the processes of a restored tree where they are to start, frozen."""
    processes: tuple[Placed, ...]


class StartTree(Message, frozen=True):
    """All tasks were let go of: thaw them. They are no longer ended when the worker dies."""


class NoteStep(Message, frozen=True):
    """Write a step down, for whoever has to undo it as this user."""
    step: MakeFile | KeepFile | MakeSegment


class KeepContent(Message, frozen=True):
    """Make a file in the spool for the content of one that is about to be changed."""


MAX_FILES = 200         # fds of a message; the kernel takes SCM_MAX_FD, 253 (include/net/scm.h)

BrokerCall = (OpenImage | NewImage | Publish | FreezeTree | LetRun | HoldTree | RestoreTree | EndTree | ReadTimers
              | PlaceTree | StartTree | NoteStep | KeepContent)
FromUsersWorker = FromWorker | BrokerCall
