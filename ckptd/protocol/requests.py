# SPDX-License-Identifier: LGPL-2.1-or-later
"""The request of each operation: what the daemon asks a worker to do, with whose rights and where. Each is sent in a
Start message.

    JobRequest                  what every job has                                  fd that may come with it
      TreeRequest               an operation on live tasks                          pidfd of the target
        ScanRequest             scan            list the tasks
        TraceRequest            check-trace     ask about a security module
        FreezerRequest          the tree is frozen, or it is checked whether it could be
          HoldRequest           freeze          freeze until Thaw
          DumpRequest           the tree is saved, or it is checked whether it could be
            CheckRequest        check
            CheckpointRequest   checkpoint
      ImageRequest              an operation on a published image
        VerifyRequest           verify          list damages
        ImageTreeRequest        tree            list the tasks
        RemoveNamesRequest      remove-names    remove what the image has outside of it
        ExportRequest           export          write a stream                      the output
        RestartRequest          the tree is restored, or it is checked whether it could be
                                                                                    a terminal, for files that are only
                                                                                    named in the image; then the sockets
                                                                                    of `inherit`, in their order
          RestoreRequest        restore
          CheckRestoreRequest   check-restore
      ImportRequest             import          read a stream                       the input
      RecoverRequest            recover         undo the file steps of dead workers

The operation is the tag of the request in the message.
"""

from typing import Literal, cast, get_args

import msgspec

from ckptd.kernel.bounds import Bounds
from ckptd.target import Target

Operation = Literal['checkpoint', 'check', 'scan', 'freeze', 'verify', 'tree', 'export', 'import',
                    'restore', 'check-restore', 'check-trace', 'recover', 'remove-names']
FreezeMode = Literal['auto', 'cgroup', 'unit', 'ptrace', 'caller']
After = Literal['resume', 'kill', 'freeze']
ChangedFiles = Literal['refuse', 'accept', 'rollback']
Format = Literal['core', 'tar']       # of an export: a core per process, or the image itself
FORMATS = get_args(Format)


class Caller(msgspec.Struct, frozen=True):
    """The caller, as the bus reports it."""
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    pid: int = 0                         # of the calling process
    capabilities: int = -1               # effective set of the calling process as a mask, -1 if unknown
    bounding: int = -1                   # bounding set of the calling process, -1 if unknown
    no_new_privs: bool = False           # restriction of the process, which its request must not lift
    seccomp: bool = False                # likewise
    label: str = ''                      # of a security module, for the log
    start_time: int = 0                  # of the process, as in Stat; 0 if unknown. The pid alone may belong to another
                                         # process later (ckptd.kernel.pidfd.held).
    bounds: Bounds | None = None         # of the process at the time of the call, None if unknown
    confinement: tuple[str, ...] = ()    # names of what confines the process (ckptd.kernel.confinement); empty if an
                                         # administrator lets it act beyond that


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, tag_field='operation'):
    """A request for one operation."""
    caller: Caller                      # the work is done with the rights of this caller
    spool: str                          # directory of images
    runtime: str                        # directory of the freeze journal
    job: int = 0                        # number of the job, 0 if it is not announced
    asker: int = -1                     # uid of the user who asked, if not `caller`: with an administrator's
                                        # authorization the caller is root. Else -1.
    systemd: bool = False               # a systemd manager can be asked (UnitRequest, ScopeRequest)
    timeout_usec: int = 10_000_000      # deadline of a freeze; and a user's worker may be stopped for that long by a
                                        # signal before its broker kills it
    brokered: bool = False              # the worker is an ordinary user, and its broker does what needs root's rights

    @property
    def operation(self) -> Operation:
        return operation_of(type(self))

    @property
    def asked_by(self) -> int:
        """Uid of the user who asked."""
        return self.caller.uid if self.asker < 0 else self.asker

    @property
    def image_id(self) -> str:
        """Id of the image that the job writes or reads; '' for none, and while it is unknown."""
        return ''

    @property
    def about(self) -> str:
        """Text of the target; for an image, of the target that was dumped; '' for none."""
        return ''


def operation_of(kind: type[JobRequest]) -> Operation:
    """Return the operation of requests of a class."""
    return cast(Operation, kind.__struct_config__.tag)


# ---------------------------------------------------------------- live tasks

class TreeRequest(JobRequest, frozen=True, kw_only=True):
    """A request about a tree of live tasks."""
    target: Target              # 'self' and pidfds have become a process
    start_time: int = 0         # of the process of a ProcessTarget (/proc/PID/stat), as its pid may be reused; 0 for
                                # other targets, and if it does not matter

    @property
    def about(self) -> str:
        return str(self.target)


class ScanRequest(TreeRequest, frozen=True, kw_only=True, tag='scan'):
    """List the tasks that the caller sees."""


class TraceRequest(TreeRequest, frozen=True, kw_only=True, tag='check-trace'):
    """Tell whether a security module forbids the caller to trace tasks that it may inspect."""


class UnitFacts(msgspec.Struct, frozen=True):
    """State of a unit when the job begins, as its manager knows it."""
    main_pid: int = 0           # its main process
    watchdog_usec: int = 0      # time in which that has to send WATCHDOG=1, 0 for no limit
    control_pid: int = 0        # process of a command of the unit, such as ExecStop=, which is no part of the tree


class FreezerRequest(TreeRequest, frozen=True, kw_only=True):
    """A request to freeze a tree, or to check whether that is possible."""
    unit: UnitFacts = UnitFacts()       # of a UnitTarget, if there is a manager
    freeze: FreezeMode = 'auto'         # what stops the tree; with 'caller' it must be at rest already
    avoid: tuple[int, ...] = ()         # pids that must not be in the tree: the daemon, its bus, its client, workers


class HoldRequest(FreezerRequest, frozen=True, kw_only=True, tag='freeze'):
    """Freeze the tree and hold it until Thaw."""


class DumpRequest(FreezerRequest, frozen=True, kw_only=True):
    """A request to save a tree, or to check whether that is possible."""
    sever: int = 0                      # for a request of the caller about itself: inode of the daemon's socket to the
                                        # bus. The tree's connections to that bus do not outlive the dump. Else 0.
    may_move: bool = False              # a worker outside of the daemon's sandbox can take over, if this one says that
                                        # it is Confined
    external: tuple[str, ...] = ()      # policies for connections to the outside (ckptd.external), the later counts
    sysv: tuple[str, ...] = ()          # System V objects that belong to the image (ckptd.sysv)
    trace_under_yama: bool = False      # the user's worker keeps CAP_SYS_PTRACE until it traces the tree
    as_root: bool = False               # root's worker dumps the tree although it belongs wholly to one user


class CheckRequest(DumpRequest, frozen=True, kw_only=True, tag='check'):
    """List every refusal and warning of a checkpoint."""


class CheckpointRequest(DumpRequest, frozen=True, kw_only=True, tag='checkpoint'):
    """Write an image of the tree."""
    image: str                          # id of the new image
    after: After = 'resume'             # what happens to the tree afterwards
    stop_unit: bool = False             # the tree is a unit, which its manager stops when the tree is killed
    force: bool = False                 # the tree may be killed although a restart would be refused
    save_files: bool = False            # the content of regular files that are open for writing is kept
    save_limit: int = 1 << 30           # bytes of such content in all
    keep_free: int = 0                  # bytes of the spool's file system that must stay free

    @property
    def image_id(self) -> str:
        return self.image


# ---------------------------------------------------------------- images

class ImageRequest(JobRequest, frozen=True, kw_only=True):
    """A request about a published image."""
    image: str              # its id
    dumped: str = ''        # text of the target that was dumped, from the manifest. It is only shown

    @property
    def image_id(self) -> str:
        return self.image

    @property
    def about(self) -> str:
        return self.dumped


class VerifyRequest(ImageRequest, frozen=True, kw_only=True, tag='verify'):
    """List every damage of the image."""


class ImageTreeRequest(ImageRequest, frozen=True, kw_only=True, tag='tree'):
    """List the tasks of the image."""


class RemoveNamesRequest(ImageRequest, frozen=True, kw_only=True, tag='remove-names'):
    """Remove what the checkpoint made outside of the image: names of deleted files, and filters that hold
    connections."""


class ExportRequest(ImageRequest, frozen=True, kw_only=True, tag='export'):
    """Write the image as a tar stream."""
    format: Format                      # of the files in the stream: a core per process, or the parts of the image
    writer: Caller | None = None        # the stream is written with this caller's rights, if not those of `caller`
    stall_usec: int = 0                 # microseconds that the stream may stand still, 0 for no limit


class RestartRequest(ImageRequest, frozen=True, kw_only=True):
    """A request to restore a tree, or to check whether that is possible."""
    cgroup: str = ''                            # cgroup for the tree, '' for its former one
    new_pidns: bool = False                     # use a new pid namespace
    clamp: bool = False                         # limits and priorities that may not be set become the nearest that may
    force: bool = False                         # another instance of the unit may run
    leave_stopped: bool = False                 # stop every process, as by SIGSTOP
    detach_terminal: bool = False               # the tree gets no terminal in place of one outside of it
    inherit: tuple[str, ...] = ()               # peers outside of the tree (ckptd.external), for whose connections the
                                                # caller gives a socket; the last fds of the request
    wait: bool = False                          # the worker stays the root's parent, and Finished comes when the root
                                                # has ended
    changed_files: ChangedFiles = 'refuse'      # treatment of files that have changed since the checkpoint
    hard_limits: tuple[int, ...] = ()           # in a worker of a user: hard limits of the calling process by RLIMIT_*
                                                # number; not all of them bind the worker itself


class RestoreRequest(RestartRequest, frozen=True, kw_only=True, tag='restore'):
    """Restore the tree."""
    keep_free: int = 0                          # bytes of the spool's file system that must stay free, whatever the
                                                # undo of changed files writes there


class CheckRestoreRequest(RestartRequest, frozen=True, kw_only=True, tag='check-restore'):
    """List every refusal and warning of a restore."""


class ImportRequest(JobRequest, frozen=True, kw_only=True, tag='import'):
    """Read an image from a tar stream. The image belongs to the caller."""
    size_limit: int             # bytes that the image may have
    keep_free: int = 0          # bytes of the spool's file system that must stay free
    stall_usec: int = 0         # microseconds that the stream may stand still, 0 for no limit


class RecoverRequest(JobRequest, frozen=True, kw_only=True, tag='recover'):
    """Undo the file steps of dead workers."""


Request = (ScanRequest | TraceRequest | HoldRequest | CheckRequest | CheckpointRequest | VerifyRequest
           | ImageTreeRequest | RemoveNamesRequest | ExportRequest | RestoreRequest | CheckRestoreRequest
           | ImportRequest | RecoverRequest)
