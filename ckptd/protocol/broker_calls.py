# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of a worker to its broker: one message each, answered by an Answer.

    call            answer                          checked by the broker
    OpenImage       names; fds of the files         the image is the job's and its owner the user; regular files
    NewImage        image; fd of its directory      one per job; in a directory that only root and the worker reach
    Publish         the manifest                    names, types, sizes and link counts; root owns all files before
    FreezeTree      mode, moved                     every uid of every task is the user's, before and after
    LetRun, HoldTree, RestoreTree                   the tree that FreezeTree froze
    StopUnit        -                               the job kills a unit, its image is published, and polkit lets the
                                                    user stop the unit
    EndTree         -                               the tree that FreezeTree froze, or the worker traces its processes;
                                                    its image is published, every uid still the user's
    ReadTimers      ends of sleeps                  tasks that the worker traces and that sleep; only timers that come
                                                    and go with them
    FindWatched     paths of watched files          the user may inspect the task, and reaches the file by the path
    PlaceTree       -                               stubs: traced by the worker, younger than it, the user's uids
    StartTree       -                               after PlaceTree; from here on the tree lives
    NoteStep        -                               a file, name or segment that the worker makes, for a later undo
    NoteWalk, EndWalk                               sockets whose queues the worker walks, for an undo if it dies
    NoteTaken, EndTaken                             data that it takes out of a tree which it then kills, likewise
    KeepContent     path; fd of an empty file       for content that a rollback overwrites
"""

import msgspec

from ckptd.journal.steps import Count, Known, LinkFile, Pid, RestartStep, TakeFromTerminal, WalkQueues
from ckptd.protocol.messages import FromWorker, Message
from ckptd.protocol.requests import FreezeMode


class OpenImage(Message, frozen=True):
    """Open the files of the image, MAX_FILES at a time, from number `first` on."""
    first: int = 0


class NewImage(Message, frozen=True):
    """Make the directory that the image is written to."""
    image: str = ''    # id of an imported image; the new id will be similar
    size: Count = 0    # bytes of the image


class Publish(Message, frozen=True):
    """Make the image visible. Its manifest is among the files, but its fields for owner, id and origin are ignored."""


class FreezeTree(Message, frozen=True):
    """Freeze the job's tree. remote_calls: the tree must be able to run for its tracer."""
    mode: FreezeMode
    remote_calls: bool


class LetRun(Message, frozen=True):
    """Thaw the tree, whose tasks are all stopped by their tracer."""


class HoldTree(Message, frozen=True):
    """Freeze the tree again after LetRun."""


class RestoreTree(Message, frozen=True):
    """Restore the state that was found before the freeze."""


class StopUnit(Message, frozen=True):
    """Have the unit of the tree stopped by its manager. The answer comes when the stop has begun."""


class EndTree(Message, frozen=True):
    """Announce that the worker ends the tree now. Tasks that it leaves alive are ended by the broker or a recovery.
    processes: of a tree that the worker has stopped by ptrace. again: freeze the tree before; False only after
    StopUnit."""
    processes: tuple[Known, ...] = ()
    again: bool = True


class ReadTimers(Message, frozen=True):
    """Read /proc/timer_list: while no task of the job sleeps, or while these tasks sleep."""
    asleep: tuple[Pid, ...] = ()


class FindWatched(Message, frozen=True):
    """Find the files that an inotify instance watches: fd `fd` of task `tid`, or of the worker. Files with a number
    above `after` are found, as many as fit into the answer. The paths are those of task `seen_by`."""
    tid: Pid
    fd: Count
    seen_by: Pid
    after: Count = 0


class Placed(msgspec.Struct, array_like=True, frozen=True):
    """A restored process: its pid, and the cgroup that it was in."""
    pid: Pid
    cgroup: str


class PlaceTree(Message, frozen=True):
    """Put the processes of a restored tree into their cgroups, frozen."""
    processes: tuple[Placed, ...]


class StartTree(Message, frozen=True):
    """Thaw the tree, after all tasks were released. From now on they are not ended when the worker dies."""


class NoteStep(Message, frozen=True):
    """Write a step to the journal, to be undone with this user's rights."""
    step: RestartStep | LinkFile


class NoteWalk(Message, frozen=True):
    """Write to the journal which sockets have their queues walked, until EndWalk."""
    step: WalkQueues


class EndWalk(Message, frozen=True):
    """The worker has set the old offsets itself."""


class NoteTaken(Message, frozen=True):
    """Write to the journal what is taken out of a terminal, until EndTaken."""
    step: TakeFromTerminal


class EndTaken(Message, frozen=True):
    """The tree is dead, and the image has what was taken."""


class KeepContent(Message, frozen=True):
    """Make a file in the spool for the content of one that is about to be changed."""


MAX_FILES = 200         # fds in a message; the kernel accepts SCM_MAX_FD, 253 (include/net/scm.h)

BrokerCall = (OpenImage | NewImage | Publish | FreezeTree | LetRun | HoldTree | RestoreTree | StopUnit | EndTree
              | ReadTimers | FindWatched | PlaceTree | StartTree | NoteStep | NoteWalk | EndWalk | NoteTaken | EndTaken
              | KeepContent)
FromUsersWorker = FromWorker | BrokerCall
