# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages between daemon and worker: tagged msgpack, one per packet of a SOCK_SEQPACKET socketpair.

Between the two, for a job of an ordinary user, is a broker (worker/broker), which passes them on. Its worker sends it
the calls of protocol/broker_calls.py as well, and gets an Answer for each.

    daemon -> worker    Follow (with a pidfd, first of all, where the kernel has such pidfds)
                        Start (with fds: pidfd of the target, output of an export or input of an import, a terminal,
                        if any, in this order)   Cancel   Thaw   UnitDone
    worker -> daemon    Phase   Progress   UnitRequest   ScopeRequest   Frozen   Running   Log
                        and last: Finished or Failed

End-of-file means that the other side is dead: the worker then releases its tree and exits, the daemon cleans up. To a
worker the pidfd of Follow means the same, as the files of a dead daemon may stay open (ckptd.kernel.liveness).
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from ckptd.errors import CkptError, Finding, from_details
from ckptd.kernel.bounds import Bounds

MAX_MESSAGE = 192 << 10     # below the default SO_SNDBUF, so a packet is never refused for its size
MAX_TEXT = 1000             # characters of a text in a row
MAX_SENTENCE = 16_000       # of the sentence of an error, and of a line of the log
MAX_ROWS = 100              # of an error and of a result: signals carry them, and a bus takes no signal of any size
MAX_ROWS_SIZE = 96 << 10    # bytes of the texts in them

Operation = Literal['checkpoint', 'check', 'scan', 'freeze', 'thaw', 'verify', 'tree', 'export', 'import',
                    'restore', 'check-restore', 'check-trace', 'recover']
FreezeMode = Literal['auto', 'cgroup', 'unit', 'ptrace', 'caller']
After = Literal['resume', 'kill', 'freeze']
ChangedFiles = Literal['refuse', 'accept', 'rollback']
FORMATS = ('core', 'tar')       # of an export: a core per process, or the image itself
PHASES = ('resolve', 'scan', 'freeze', 'rescan', 'seize', 'state', 'memory', 'release', 'write', 'publish')
IMPORT_PHASES = ('receive', 'verify', 'publish')
RESTORE_PHASES = ('verify', 'plan', 'open', 'create', 'fill', 'rebuild', 'place', 'start', 'attend')


class Caller(msgspec.Struct, frozen=True):
    """The caller, as the bus reports it.

    capabilities, bounding: effective and bounding set of the calling process as masks, -1 if unknown. no_new_privs,
    seccomp: restrictions of the process, which its request must not lift. label: of a security module, for the log.
    start_time: of the process, as in Stat, 0 if unknown; the pid alone may belong to another process later
    (ckptd.kernel.pidfd.held). bounds: of the process at the time of the call, None if unknown. confinement: names of
    what confines the process (ckptd.kernel.confinement); empty if an administrator lets it act beyond that.
    """
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    pid: int = 0
    capabilities: int = -1
    bounding: int = -1
    no_new_privs: bool = False
    seccomp: bool = False
    label: str = ''
    start_time: int = 0
    bounds: Bounds | None = None
    confinement: tuple[str, ...] = ()


class JobRequest(msgspec.Struct, frozen=True):
    """A request for one operation. target: 'pid:N', a unit name, 'cgroup:/path'; 'self' and pidfds have become pid:N
    with has_pidfd.

    timeout_usec: deadline of the freeze. spool: directory of images; image: id of the image to write or read.
    runtime: directory of the freeze journal. systemd: a systemd manager can be asked to freeze units (UnitRequest).
    avoid: pids that must not be in the tree (the daemon, its bus, its client).
    sever: of a request about the caller itself, inode of the daemon's own socket to the bus: what the tree has
    connected to that bus does not outlive the dump. Else 0.
    asker: uid of who asked, where that is not the caller, by whose rights the work is done: with an administrator's
    authorization root's. Else -1.
    start_time: of the process that a target pid:N is, /proc/PID/stat: its number may be another's by now. Else 0.
    has_output: the caller gives an fd, where an export goes, or where an import comes from. format: of an export,
    'core' or 'tar'. Of an import: image is not looked at, the caller becomes the owner, save_limit: bytes it may have.
    stall_usec: of both, how long the stream may stand still, 0 for ever. writer: of an export, by whose rights it is
    written, where that is not the caller.
    save_files: a checkpoint keeps the content of regular files open for writing, up to save_limit bytes in all.
    brokered: the worker is an ordinary user, and what takes a right of root's is done by its broker. hard_limits: of a
    restart by such a worker, those of the calling process by RLIMIT_* number; not all of them bind the worker itself.
    trace_under_yama: a user's worker keeps CAP_SYS_PTRACE until it traces the tree. as_root: root's worker is to dump a
    tree although it is all one user's.
    keep_free: of a checkpoint, an import and a restart: bytes of the spool's file system that stay free, whatever is
    written.
    Of a restart: cgroup: where it is to live, '' for where it was. new_pidns: in a pid namespace of its own.
    clamp: limits and priorities that may not be set come back as the nearest that may. leave_stopped: every process is
    stopped, as by SIGSTOP. wait: the worker stays the root's parent, and Finished comes when the root has ended.
    changed_files: what to do about files that went on living. has_terminal: the caller gives a terminal for those that
    the image only names.
    """
    operation: Operation
    target: str
    caller: Caller
    spool: str
    runtime: str
    job: int = 0
    image: str = ''
    freeze: FreezeMode = 'auto'
    after: After = 'resume'
    timeout_usec: int = 10_000_000
    has_pidfd: bool = False
    has_output: bool = False
    format: str = ''
    avoid: tuple[int, ...] = ()
    systemd: bool = False
    sever: int = 0
    save_files: bool = False
    save_limit: int = 1 << 30
    cgroup: str = ''
    new_pidns: bool = False
    clamp: bool = False
    leave_stopped: bool = False
    wait: bool = False
    changed_files: ChangedFiles = 'refuse'
    has_terminal: bool = False
    asker: int = -1
    start_time: int = 0
    stall_usec: int = 0
    keep_free: int = 0
    writer: Caller | None = None
    brokered: bool = False
    hard_limits: tuple[int, ...] = ()
    trace_under_yama: bool = False
    as_root: bool = False

    @property
    def asked_by(self) -> int:
        """uid of who asked."""
        return self.caller.uid if self.asker < 0 else self.asker


class Message(msgspec.Struct, tag=True, frozen=True):
    """Base of all."""


class Start(Message, frozen=True):
    request: JobRequest


class Follow(Message, frozen=True):
    """Its pidfd is readable when the daemon is dead."""


class Cancel(Message, frozen=True):
    pass


class Thaw(Message, frozen=True):
    """Let go of what Frozen announced; the worker answers Finished."""


class Answer(Message, frozen=True):
    """Answer of a broker to a call of its worker, with the fds that the call asks for. failed: instead of a value."""
    value: dict[str, Any] = {}
    failed: 'Failed | None' = None


class UnitDone(Message, frozen=True):
    """Answer to UnitRequest and ScopeRequest; error is empty on success."""
    error: str = ''


class Phase(Message, frozen=True):
    name: str


class ProgressReport(Message, frozen=True):
    tasks_done: int
    tasks_total: int
    bytes_done: int
    bytes_total: int


class UnitRequest(Message, frozen=True):
    """Please FreezeUnit or ThawUnit."""
    unit: str
    action: Literal['freeze', 'thaw']


class ScopeRequest(Message, frozen=True):
    """Please have systemd make a scope of these processes (StartTransientUnit); answered when it is there. slice: where
    it is, '' for the manager's default."""
    scope: str
    pids: tuple[int, ...]
    slice: str = ''


class TreeRuns(Message, frozen=True):
    """The restored tree runs. root: its pid as the worker sees it. With `wait` the worker now attends its end."""
    root: int
    tasks: int


class Frozen(Message, frozen=True):
    """The tree is frozen and this worker holds it (operation freeze, or after=freeze once the image is published)."""
    target: str
    tasks: int
    mode: str


class Log(Message, frozen=True):
    level: int
    text: str


class Finished(Message, frozen=True):
    """result: checkpoint: the manifest's summary; check, check-restore: {'refusals': [...], 'tasks': N};
    scan, tree: {'tasks': [...]}; verify: {'damages': [...]}; export: {'files': names in the stream}; import: {'image',
    'bytes': of its parts}; recover: {'report': [...]}; restore: {'image', 'root',
    'inside', 'tasks', 'processes', 'cgroup', 'warnings': [...], 'restored_usec', times in microseconds}, with `wait`
    also {'exit_status': as of wait(2)}. Results above MAX_MESSAGE come as `more` packets: each a list to append."""
    result: dict[str, Any] = {}
    more: bool = False


class Failed(Message, frozen=True):
    """A failed job, with its first refusals (first_rows). The message says how many there are."""
    name: str
    message: str
    details: dict[str, Any]

    @classmethod
    def of(cls, error: CkptError) -> 'Failed':
        details = {key: cut(value) if isinstance(value, str) else value for key, value in error.details().items()}
        return cls(error.name, cut(error.message, MAX_SENTENCE), {**details, 'refusals': first_rows(error.refusals)})

    def error(self) -> CkptError:
        return from_details(self.name, self.message, self.details)


ToWorker = Follow | Start | Cancel | Thaw | UnitDone | Answer
FromWorker = Phase | ProgressReport | UnitRequest | ScopeRequest | Frozen | TreeRuns | Log | Finished | Failed


def finding_row(refusal: Finding) -> dict[str, Any]:
    """A refusal as a message carries it."""
    row = {field: getattr(refusal, field) for field in Finding.__dataclass_fields__}
    return {field: cut(value) if isinstance(value, str) else value for field, value in row.items()}


def first_rows(refusals: Iterable[Finding]) -> list[dict[str, Any]]:
    """Cut a list of refusals to the number that an error or a result may carry."""
    rows: list[dict[str, Any]] = []
    left = MAX_ROWS_SIZE
    for refusal in refusals:
        row = finding_row(refusal)
        left -= sum(len(text.encode(errors='backslashreplace')) for text in row.values() if isinstance(text, str))
        if left < 0 or len(rows) == MAX_ROWS:
            break
        rows.append(row)
    return rows


def cut(text: str, most: int = MAX_TEXT) -> str:
    """The text, or its first `most` characters, which then end in '...'."""
    return text if len(text) <= most else text[:most - 3] + '...'


# ---------------------------------------------------------------- between the daemon and its spawner

MAX_SPAWN = 1 << 17     # bytes of a message


class SpawnWorker(Message, frozen=True):
    """command: a program instead of a worker, which gets the number of its socket as its last argument."""
    number: int
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}


class Spawned(Message, frozen=True):
    """pid: 0 where it could not be started, for the reason of errno."""
    number: int
    pid: int
    errno: int = 0


class Exited(Message, frozen=True):
    """status: as subprocess has it."""
    number: int
    status: int


FromSpawner = Spawned | Exited
