# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages between daemon and worker: tagged msgpack, one per packet of a SOCK_SEQPACKET socketpair.

For a job of an ordinary user, a broker (worker/broker) is between the two and passes the messages on. Its worker also
sends it the calls of protocol/broker_calls.py and gets an Answer for each.

    daemon -> worker    Follow (with a pidfd, first of all, where the kernel has such pidfds)
                        Start (perhaps with an fd, see protocol/requests.py)   Cancel   Thaw   UnitDone
    worker -> daemon    Phase   Progress   UnitRequest   ScopeRequest   Frozen   Running   Log
                        and last: Finished or Failed

End-of-file means that the other side is dead: the worker then releases its tree and exits, the daemon cleans up. For a
worker the end of the pidfd of Follow means the same, as the files of a dead daemon may stay open
(ckptd.kernel.liveness).
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from ckptd.errors import CkptError, Finding, from_details
from ckptd.protocol.requests import Request

MAX_MESSAGE = 192 << 10     # below the default SO_SNDBUF, so that no packet is refused for its size
MAX_TEXT = 1000             # characters of a text in a row
MAX_SENTENCE = 16_000       # of the message of an error, and of a line of the log
MAX_ROWS = 100              # of an error and of a result: signals carry them, and a bus limits the size of signals
MAX_ROWS_SIZE = 96 << 10    # bytes of the texts in them

PHASES = ('resolve', 'scan', 'freeze', 'rescan', 'seize', 'state', 'memory', 'release', 'write', 'publish')
IMPORT_PHASES = ('receive', 'verify', 'publish')
RESTORE_PHASES = ('verify', 'plan', 'open', 'create', 'fill', 'rebuild', 'start', 'attend')


class Message(msgspec.Struct, tag=True, frozen=True):
    """Base of all messages."""


class Start(Message, frozen=True):
    request: Request


class Follow(Message, frozen=True):
    """Tell the worker to watch the daemon: the pidfd of this message is readable when the daemon is dead."""


class Cancel(Message, frozen=True):
    pass


class Thaw(Message, frozen=True):
    """Release the freeze that Frozen announced. The worker answers Finished."""


class Answer(Message, frozen=True):
    """The answer of a broker to a call of its worker, with the fds that the call asks for. failed: an error instead of
    a value."""
    value: dict[str, Any] = {}
    failed: 'Failed | None' = None


class UnitDone(Message, frozen=True):
    """Answer to UnitRequest and ScopeRequest. error is empty on success."""
    error: str = ''


class Phase(Message, frozen=True):
    name: str


class ProgressReport(Message, frozen=True):
    tasks_done: int
    tasks_total: int
    bytes_done: int
    bytes_total: int


UnitAction = Literal['freeze', 'thaw', 'stop']


class UnitRequest(Message, frozen=True):
    """Ask the daemon to call FreezeUnit, ThawUnit or StopUnit. To `stop` it answers when the stop has begun, and it
    waits for the end of the stop when the job has finished."""
    unit: str
    action: UnitAction


class ScopeRequest(Message, frozen=True):
    """Ask the daemon to let systemd make a scope of these processes (StartTransientUnit). It answers when the scope
    exists. slice: for the scope, '' for the manager's default."""
    scope: str
    pids: tuple[int, ...]
    slice: str = ''


class TreeRuns(Message, frozen=True):
    """The restored tree runs. root: its pid as the worker sees it. With `wait` the worker now waits for the root's
    end."""
    root: int
    tasks: int


class Frozen(Message, frozen=True):
    """The tree is frozen and this worker holds it (operation freeze, or after=freeze once the image is published)."""
    tasks: int
    mode: str


class Confined(Message, frozen=True):
    """The worker is too confined for the tree: it inherits the daemon's sandbox. It has done nothing, and ends."""


class Log(Message, frozen=True):
    level: int
    text: str


class Finished(Message, frozen=True):
    """The job is done. Results above MAX_MESSAGE come as several packets with `more`; each has a list to append.

    result: checkpoint: the manifest's summary; check, check-restore: {'refusals': [...], 'tasks': N}; scan, tree:
    {'tasks': [...]}; verify: {'damages': [...]}; export: {'files': names in the stream}; import: {'image', 'bytes': of
    its parts}; recover: {'report': [...]}; restore: {'image', 'root', 'inside', 'tasks', 'processes', 'cgroup',
    'warnings': [...], 'restored_usec', times in microseconds}, with `wait` also {'exit_status': as of wait(2)}.
    """
    result: dict[str, Any] = {}
    more: bool = False


class Failed(Message, frozen=True):
    """The job has failed. It carries the first refusals only (first_rows); the message says how many there are."""
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
FromWorker = (Phase | ProgressReport | UnitRequest | ScopeRequest | Frozen | TreeRuns | Confined | Log | Finished
              | Failed)


def finding_row(refusal: Finding) -> dict[str, Any]:
    """Return a refusal as a row of a message."""
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
    """Return the text, or its first `most` characters, which then end in '...'."""
    return text if len(text) <= most else text[:most - 3] + '...'


# ---------------------------------------------------------------- between the daemon and its spawner

MAX_SPAWN = 1 << 17     # bytes of a message


class SpawnWorker(Message, frozen=True):
    """Start a worker. command: a program to run instead; it gets the number of its socket as its last argument."""
    number: int
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}


class Spawned(Message, frozen=True):
    """A worker was started. pid: 0 if it could not be started, for the reason in errno."""
    number: int
    pid: int
    errno: int = 0


class Exited(Message, frozen=True):
    """A worker has ended. status: as in subprocess."""
    number: int
    status: int


FromSpawner = Spawned | Exited
