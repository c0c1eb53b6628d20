# SPDX-License-Identifier: LGPL-2.1-or-later
"""Method calls to exported objects: one way in, one way out, and nothing of ours leaks to the caller.

    from ckptd.bus.export import Exported, method, property_, signal
    from ckptd.bus.router import Call, Router

    class ManagerObject(Exported):
        interface = 'org.ckptd1.Manager'

        def __init__(self, queue: Queue) -> None:
            self.queue = queue

        @method('sa{sv}', 'o', names=('target', 'options', 'job'))
        async def Checkpoint(self, call: Call, target: str, options: dict[str, Any]) -> str:
            job = self.queue.add(target, options, await call.credentials())
            self.JobNew(job.id, job.path)
            self.changed('Jobs')
            return job.path

        @method('ha{sv}', 'o', names=('pidfd', 'options', 'job'))
        async def CheckpointProcess(self, call: Call, pidfd: int, options: dict[str, Any]) -> str:
            mine = call.take(pidfd)         # what is not taken is closed when the handler returns
            ...

        @method('sa{sv}', 'aa{sv}', names=('target', 'options', 'refusals'), types={'pid': 'u'})
        async def Check(self, call: Call, target: str, options: dict[str, Any]) -> list[dict[str, Any]]: ...

        @property_('s', emits='const')
        def Version(self) -> str: ...

        @property_('u')
        def Jobs(self) -> int: ...

        JobNew = signal('uo', names=('id', 'job'))

    connection = await Connection.open(address)                # an address, 'system' or 'session'
    router = Router(connection, spawn=task_group.create_task, root=ROOT)
    router.export(ROOT, ManagerObject(queue))                  # sends InterfacesAdded from the root path
    await connection.request_name(BUS_NAME)                    # after the exports: a call may be waiting already
    ...
    router.unexport(path)

Handlers take and return plain Python (values.py): variants are unwrapped, 'h' is an fd, a{sv} results get their types
from `types` or by guess. They raise CkptError for what the caller is to know.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from ckptd.bus import wire
from ckptd.bus.connection import Connection
from ckptd.bus.export import Exported, Method
from ckptd.bus.message import DBusError, ProtocolError
from ckptd.bus.peers import Peers
from ckptd.bus.registry import ERROR, Registry
from ckptd.bus.standard import Changes, Introspectable, ObjectManager, Peer, Properties
from ckptd.bus.values import NO_TYPES, to_body
from ckptd.bus.wire import Message, Received
from ckptd.engine.messages import Caller
from ckptd.errors import Cancelled, CkptError, InvalidArgument, LimitsExceeded

log = logging.getLogger(__name__)

MAX_CALLS = 32          # in flight, of one sender
MAX_FDS = 16            # with one call
LARGE = 256             # rows of a result that another thread marshals
ERROR_TYPES = {'task': 'u', 'pid': 'u', 'refusals': 'aa{sv}'}


class Spawn(Protocol):
    """Who owns the tasks: TaskGroup.create_task, or a queue's own."""

    def __call__(self, coro: Coroutine[Any, Any, None], *, name: str | None = None) -> asyncio.Task[None]: ...


class Call:
    """One method call while it is served."""
    __slots__ = ('_peers', 'answered', 'message')

    def __init__(self, message: Received, peers: Peers) -> None:
        self.message, self._peers = message, peers
        self.answered = not message.wants_reply

    @property
    def sender(self) -> str:
        """Unique name of the caller, ':1.42'; the bus vouches for it."""
        return self.message.sender

    @property
    def interactive(self) -> bool:
        """The caller waits long enough for a person to be asked (ALLOW_INTERACTIVE_AUTHORIZATION)."""
        return self.message.interactive

    async def credentials(self) -> Caller:
        """Who calls, as the bus says."""
        return await self._peers.caller(self.sender)

    @contextlib.asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """Cancel the block when the caller leaves the bus: nobody waits for its result any more."""
        task = asyncio.current_task()
        assert task is not None

        def leave() -> None:
            task.cancel()

        await self._peers.when_gone(self.sender, leave)
        try:
            yield
        finally:
            self._peers.never_mind(self.sender, leave)

    def take(self, fd: int) -> int:
        """Make an fd argument the handler's own; all others are closed when it returns."""
        return self.message.fds.take(fd)

    def __str__(self) -> str:
        return f'{self.message.interface}.{self.message.member} at {self.message.path} of {self.sender}'


class Router:
    """Serves the calls of a connection, each in a task of `spawn`, and sends the signals of what is exported."""

    def __init__(self, connection: Connection, spawn: Spawn, root: str) -> None:
        self.connection, self.peers, self.root = connection, Peers(connection), root
        self._spawn = spawn
        self._in_flight: Counter[str] = Counter()
        self._changes = Changes(self.emit)
        self.registry = Registry(common=(properties := Properties(), introspectable := Introspectable()),
                                 anywhere=(introspectable, Peer()))
        self.manager = ObjectManager(self.registry, root)
        properties.registry = introspectable.registry = self.registry
        self._adopt(root, self.manager)
        connection.on_call = self.route
        connection.on_lost.append(self._lost)

    def export(self, path: str, *exported: Exported) -> None:
        """Make these interfaces one object. Subscribers hear InterfacesAdded, from the root path."""
        for one in exported:
            self._adopt(path, one)
        self.manager.added(path, exported)

    def unexport(self, path: str) -> None:
        """Remove the object; what it had to say is said before InterfacesRemoved."""
        self._changes.flush(path)
        gone = self.registry.remove(path)
        for one in gone:
            one.emitter = None
        self.manager.removed(path, gone)

    def _lost(self) -> None:
        self._changes.close()
        self.peers.close()

    def _adopt(self, path: str, exported: Exported) -> None:
        if not wire.is_object_path_valid(path):
            raise ValueError(f'{path!r} is no object path')
        self.registry.add(path, exported)
        exported.path, exported.emitter = path, self

    def emit(self, path: str, interface: str, name: str, signature: str, values: Sequence[Any],
             types: Mapping[str, str] = NO_TYPES) -> None:
        """Send a signal. Never waits; dropped, and logged, when the bus has not read for long."""
        self.connection.send(wire.make_signal(path, interface, name, signature, to_body(signature, values, types)))

    def properties_changed(self, path: str, exported: Exported, names: Sequence[str]) -> None:
        self._changes.add(path, exported, names)

    def route(self, message: Received) -> None:
        """A method call came in: find what it means and serve it in a task, at whose end its fds are closed."""
        call = Call(message, self.peers)
        try:
            exported, row = self._accept(message)
        except (DBusError, CkptError) as error:
            self._fail(call, error)
            message.fds.close()
            return
        self._in_flight[call.sender] += 1
        task = self._spawn(self.serve(call, exported, row), name=f'{row.name} of {call.sender}')
        task.add_done_callback(lambda _: self._finished(call))

    def _accept(self, message: Received) -> tuple[Exported, Method]:
        """What can be refused from the header alone; the body is not decoded before."""
        if self._in_flight[message.sender] >= MAX_CALLS:
            raise LimitsExceeded(f'more than {MAX_CALLS} calls at a time', hint='wait for replies')
        if message.raw is None or message.fds.count > MAX_FDS:
            raise LimitsExceeded(f'a call may have {wire.MAX_BODY} bytes of arguments and {MAX_FDS} file descriptors')
        exported, row = self.registry.find(message.path, message.interface, message.member)
        if message.signature != row.in_signature:
            raise DBusError(f'{ERROR}InvalidArgs',
                            f'{row.name} takes "{row.in_signature}", not "{message.signature}"')
        if message.fds.count != message.fd_count:
            # the kernel drops what does not fit under RLIMIT_NOFILE (recvmsg(2), MSG_CTRUNC)
            raise LimitsExceeded(f'{message.fds.count} file descriptors came instead of {message.fd_count}')
        return exported, row

    async def serve(self, call: Call, exported: Exported, row: Method) -> None:
        """Run the handler and answer, whatever happens; if it is cancelled, `_finished` answers."""
        try:
            result = await row.handler(exported, call, *self._arguments(call.message))
            await self._reply(call, row, result)
        except (DBusError, CkptError) as error:
            self._fail(call, error)
        except Exception:
            # its text and traceback say more about the daemon than a caller should know
            log.exception('%s failed', call)
            self._fail(call, CkptError('internal error', hint='see the log of the daemon'))
        await self.connection.drain()

    @staticmethod
    def _arguments(message: Received) -> list[Any]:
        try:
            return message.body()
        except ProtocolError as error:
            raise InvalidArgument(str(error)) from error

    async def _reply(self, call: Call, row: Method, result: Any) -> None:
        def make() -> Message:
            values = (result,) if len(row.outputs) == 1 else result or ()
            return wire.make_return(call.message, row.out_signature, to_body(row.out_signature, values, row.types))

        if call.answered:
            return
        if isinstance(result, (list, dict)) and len(result) > LARGE:
            await self.connection.send_large(make)
        else:
            self.connection.send(make())
        call.answered = True

    def _fail(self, call: Call, error: DBusError | CkptError) -> None:
        if isinstance(error, CkptError):
            name, signature, body = error.dbus_name, 'sa{sv}', to_body('sa{sv}', error_body(error), ERROR_TYPES)
        else:
            name, signature, body = error.name, 's', [error.message]
        self._answer(call, wire.make_error(call.message, name, signature, body))

    def _answer(self, call: Call, message: Message) -> None:
        if not call.answered:
            self.connection.send(message)
            call.answered = True

    def _finished(self, call: Call) -> None:
        """The task is done. Cancelled, perhaps before it began, it has not answered: a caller would wait for ever."""
        self._in_flight[call.sender] -= 1
        if not self._in_flight[call.sender]:
            del self._in_flight[call.sender]
        call.message.fds.close()
        self._fail(call, Cancelled('the daemon stops'))


def error_body(error: CkptError) -> tuple[str, dict[str, Any]]:
    """(sentence, details) of an error message."""
    return error.message, error.details()
