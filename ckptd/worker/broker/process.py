# SPDX-License-Identifier: LGPL-2.1-or-later
"""The broker of one job: a process of root between the daemon and a worker that is an ordinary user.

    daemon <-> broker       the messages of protocol/messages.py
    broker <-> worker       the same, and the calls of protocol/broker_calls.py

It starts the worker, passes messages on and answers calls. The user may stop, kill or limit the worker at any moment,
but cannot reach the broker. It kills a worker that is still stopped when the deadline of the job has passed. After any
end of the worker, the broker thaws the tree, ends a tree that does not live yet, and removes an unpublished image.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable

import msgspec

from ckptd.errors import (
    Cancelled,
    CkptError,
    FreezeTimeout,
    PermissionDenied,
    Refused,
    SpoolFailed,
    WorkerDied,
)
from ckptd.kernel import netlink
from ckptd.kernel.nsfs import machine_namespaces
from ckptd.kernel.signalfd import ChildSignals
from ckptd.kernel.timens import Offsets
from ckptd.objects.namespaces.birth import enter_clocks
from ckptd.operation.context import JobContext
from ckptd.protocol.broker_calls import BrokerCall, FromUsersWorker
from ckptd.protocol.channel import Channel
from ckptd.protocol.messages import (
    MAX_MESSAGE,
    Answer,
    Cancel,
    Confined,
    Failed,
    Finished,
    FromWorker,
    Message,
    Phase,
    ScopeRequest,
    Start,
    UnitDone,
    UnitRequest,
)
from ckptd.protocol.requests import DumpRequest, Request, RestartRequest, TreeRequest
from ckptd.restore.xstate import own_xstate
from ckptd.worker.broker.answers import BrokerAnswers
from ckptd.worker.broker.identity import Identity, become

log = logging.getLogger('ckptd.worker')

_decode = msgspec.msgpack.Decoder(FromUsersWorker).decode
_encode = msgspec.msgpack.Encoder().encode
INTERVAL = 0.5          # seconds between two checks of a worker that writes or is stopped
LAST_PATIENCE = 5.0     # seconds for the end of a worker whose daemon is gone, or that has sent its last message


class UserWorker:
    """The process of the user. At the end of the `with` it is dead and reaped."""

    def __init__(self, identity: Identity, clocks: Offsets | None, run: Callable[[int], int],
                 close_others: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                ours.close()
                close_others()
                _be_worker(identity, clocks, run, theirs)
        self.socket = ours
        self.stopped_at = 0.0       # of time.monotonic(); 0 while it runs
        self.status: int | None = None

    def __enter__(self) -> 'UserWorker':
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket, upon which it ends; otherwise send SIGKILL."""
        self.socket.close()
        deadline = time.monotonic() + LAST_PATIENCE
        with ChildSignals() as signals:
            while self.status is None:
                self.look()
                left = deadline - time.monotonic()
                if self.status is None and (left <= 0 or self.stopped_at):
                    self.kill()
                    deadline += LAST_PATIENCE
                elif self.status is None:
                    signals.wait(left)

    def look(self) -> None:
        """Check whether it was stopped, was continued or has ended."""
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not pid:
                return
            if os.WIFSTOPPED(status):
                self.stopped_at = self.stopped_at or time.monotonic()
            elif os.WIFCONTINUED(status):
                self.stopped_at = 0.0
            else:
                self.status = status

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)       # the pid stays the child's until it is waited for

    def receive(self) -> bytes:
        """Return the next packet; b'' at end-of-file."""
        try:
            return self.socket.recv(MAX_MESSAGE + 1)
        except ConnectionResetError:
            return b''

    def send(self, message: Message, fds: list[int]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):       # dead, which the next check finds
            socket.send_fds(self.socket, [_encode(message)], fds)

    def describe(self) -> str:
        """Say how it ended: 'was killed by SIGKILL'."""
        code = os.waitstatus_to_exitcode(self.status or 0)
        return f'exited with status {code}' if code >= 0 else f'was killed by {signal.Signals(-code).name}'


def _be_worker(identity: Identity, clocks: Offsets | None, run: Callable[[int], int], theirs: socket.socket) -> None:
    """Take the identity and work, in the child. Never returns."""
    status = 1
    try:
        os.setsid()
        if clocks is not None:
            # without a time namespace the plan of the restart warns that clocks jump
            with contextlib.suppress(OSError):
                enter_clocks(clocks)
        become(identity)
        status = run(theirs.detach())
    except BaseException:
        log.exception('the worker cannot start')
    finally:
        os._exit(status)


class Broker:
    """The broker of one job."""

    def __init__(self, channel: Channel, request: Request, fds: list[int], identity: Identity) -> None:
        self._channel, self._request, self._fds, self._identity = channel, request, fds, identity
        # with the rights of the tree's owner
        self._dumps_for_root = isinstance(request, DumpRequest) and not request.caller.uid
        self._is_over = False           # the worker has sent its last message
        self._cancel_told = False
        self._failure: CkptError | None = None

    def run(self, run_worker: Callable[[int], int], clocks: Offsets | None) -> int:
        """Run until the worker has ended. Return the exit status. run_worker: the worker's main function, called with
        the fd of its socket."""
        machine_namespaces()        # the user may not read them, and the worker inherits the answer
        if isinstance(self._request, DumpRequest):
            netlink.load()      # it names sockets
        elif isinstance(self._request, RestartRequest):
            # this forks, which RLIMIT_NPROC of the user may forbid later; the worker inherits the result
            own_xstate()
        with UserWorker(self._identity, clocks, run_worker, self._close_for_worker) as worker:
            self._worker = worker
            # of the fds only a pidfd is for the broker
            pidfd = self._fds[0] if self._fds and isinstance(self._request, TreeRequest) else -1
            job = JobContext(self._request, self._channel, pidfd)
            with contextlib.closing(BrokerAnswers(job, self._identity, worker.pid)) as self._powers, \
                    ChildSignals() as self._signals:
                worker.send(Start(self._workers_request()), self._fds)
                self._close_restarts_fds()
                try:
                    self._relay()
                except Cancelled:       # the daemon is gone
                    self._is_over = True
                self._await_end()
        return self._end()

    def _workers_request(self) -> Request:
        identity = self._identity
        request = msgspec.structs.replace(self._request, brokered=True)
        if isinstance(request, DumpRequest):        # outside of the sandbox the user has no more rights
            request = msgspec.structs.replace(request, may_move=False)
        if isinstance(request, RestartRequest):
            return msgspec.structs.replace(request, new_pidns=identity.new_pidns,
                                           hard_limits=tuple(hard for _, hard in identity.bounds.limits))
        if isinstance(request, DumpRequest) and self._dumps_for_root:
            caller = msgspec.structs.replace(request.caller, uid=identity.uid, gid=identity.gid, groups=identity.groups,
                                             capabilities=0)
            return msgspec.structs.replace(request, caller=caller, trace_under_yama=True)
        return request

    def _close_for_worker(self) -> None:
        """Close the fds of the broker, in the worker. It gets those that it needs by message."""
        self._channel.close()
        for fd in self._fds:
            os.close(fd)

    def _close_restarts_fds(self) -> None:
        """Close the fds that a restored tree has, because it gets no end-of-file from files that are still open
        here."""
        while self._fds and isinstance(self._request, RestartRequest):
            os.close(self._fds.pop())

    # ------------------------------------------------------------ messages

    def _relay(self) -> None:
        poll = select.poll()
        for fd in (self._channel.fileno(), self._worker.socket.fileno(), self._signals.fd):
            poll.register(fd, select.POLLIN)
        while True:
            ready = dict(poll.poll(INTERVAL * 1000))
            if self._signals.fd in ready:
                self._signals.wait(0)
            self._supervise()
            if self._worker.socket.fileno() in ready and not self._from_worker():
                return
            if self._channel.fileno() in ready and not self._from_daemon():
                return

    def _from_worker(self) -> bool:
        """Pass on messages of the worker. Return False at end-of-file."""
        data = self._worker.receive()
        if not data:
            return False
        message = _decode(data)
        if isinstance(message, BrokerCall):
            self._answer(message)
        elif isinstance(message, Confined):
            return False
        elif isinstance(message, UnitRequest | ScopeRequest):
            # only the broker itself asks systemd, for a tree that it has checked
            self._worker.send(UnitDone('the worker of an ordinary user may not ask systemd'), [])
        else:
            self._note(message)
            self._channel.send(self._with_root_hint(message) if self._dumps_for_root else message)
        return True

    def _with_root_hint(self, message: FromWorker) -> FromWorker:
        """Add the hint --as-root to a refusal that comes from the rights of the owner of the tree."""
        if not isinstance(message, Failed) or message.name not in (Refused.name, PermissionDenied.name):
            return message
        hint = f"the dump used the rights of uid {self._identity.uid}, who owns the tree; --as-root uses root's"
        return msgspec.structs.replace(message, details={**message.details, 'hint': hint})

    def _note(self, message: FromWorker) -> None:
        match message:
            case Phase(name):
                self._channel.phase_name = name
            case Failed() | Finished(more=False):
                self._is_over = True

    def _from_daemon(self) -> bool:
        """Pass on messages of the daemon. Return False when the daemon is gone."""
        message, fds = self._channel.receive()
        for fd in fds:
            os.close(fd)
        if message is None:
            self._is_over = True
            return False
        self._worker.send(message, [])
        return True

    def _answer(self, call: BrokerCall) -> None:
        fds: list[int] = []
        try:
            value, fds = self._powers.answer(call)
            answer = Answer(value)
        except (CkptError, OSError) as error:
            log.debug('%s: %s', type(call).__name__, error)
            answer = Answer(failed=Failed.of(_failure_of(error)))
        self._worker.send(answer, fds)
        for fd in fds:
            os.close(fd)
        if self._channel.cancelled and not self._cancel_told:
            # it was read while we waited for systemd or a cgroup
            self._cancel_told = True
            self._worker.send(Cancel(), [])

    # ------------------------------------------------------------ the worker

    def _supervise(self) -> None:
        """Kill a worker that fills the disk, or that was stopped for as long as a freeze may take."""
        worker = self._worker
        worker.look()
        try:
            self._powers.check_room()
        except SpoolFailed as error:
            self._failure = error
            worker.kill()
        if worker.stopped_at and time.monotonic() - worker.stopped_at > self._request.timeout_usec / 1e6:
            self._failure = FreezeTimeout(f'worker {worker.pid} was stopped by a signal and not continued',
                                          task=worker.pid, resource='worker', phase=self._channel.phase_name,
                                          hint='do not stop processes of ckptd')
            worker.kill()

    def _await_end(self) -> None:
        """Wait for the worker's death after its socket is closed. Only then do its tracees run."""
        deadline = time.monotonic() + LAST_PATIENCE
        self._worker.socket.shutdown(socket.SHUT_RDWR)
        while self._worker.status is None:
            self._worker.look()
            if self._worker.status is None:
                if time.monotonic() > deadline or self._worker.stopped_at:
                    self._worker.kill()
                self._signals.wait(max(deadline - time.monotonic(), INTERVAL))

    def _end(self) -> int:
        """Report a worker that died without a message. Return the exit status."""
        if self._is_over:
            return os.waitstatus_to_exitcode(self._worker.status or 0) if os.WIFEXITED(self._worker.status or 0) else 1
        failure = self._failure or WorkerDied(f'worker {self._worker.pid} {self._worker.describe()}',
                                              phase=self._channel.phase_name)
        with contextlib.suppress(Cancelled):
            self._channel.send(Failed.of(failure))
        return failure.exit_status


def _failure_of(error: CkptError | OSError) -> CkptError:
    """Convert an error to the one that is sent to the worker."""
    return error if isinstance(error, CkptError) else CkptError(str(error), errno=error.errno)
