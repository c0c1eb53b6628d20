# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dispatch of method calls to exported objects. Internal errors are never sent to the caller.

    from ckptd.bus.export import Exported, method, property_, signal
    from ckptd.bus.call import Call
    from ckptd.bus.router import Router

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
            mine = call.take(pidfd)         # other fds are closed when the handler returns
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

Handlers take and return plain Python values (values.py): variants are unwrapped, 'h' is an fd, a{sv} results get types
from `types` or by guess. An error that the caller should see is a CkptError.
"""

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Literal, Protocol

from ckptd.bus import wire
from ckptd.bus.call import Call
from ckptd.bus.connection import Connection
from ckptd.bus.export import Audience, Exported, Method
from ckptd.bus.intake import MAX_CALLS, MAX_FDS, Intake, require_limits
from ckptd.bus.message import DBusError, ProtocolError, UnixFd
from ckptd.bus.peers import Peers, SeesAll
from ckptd.bus.registry import ERROR, Registry
from ckptd.bus.standard import Changes, Introspectable, ObjectManager, PeerInterface, Properties
from ckptd.bus.values import NO_TYPES, index_fds, is_large, to_body
from ckptd.bus.wire import Message, ReadyError, Received
from ckptd.errors import Cancelled, CkptError, InvalidArgument, LimitsExceeded, PermissionDenied
from ckptd.jobs.audit import audit
from ckptd.jobs.slots import Slots

__all__ = ['MAX_CALLS', 'MAX_FDS', 'Router']

log = logging.getLogger(__name__)

STANDARD = 'org.freedesktop.DBus.'      # prefix of interfaces that need no authorization
LARGE = 1000            # values in a result from which on a thread marshals it: each takes some 5 us
LONG = 2                # long answers worked on at a time; one for each user
ERROR_TYPES = {'task': 'u', 'pid': 'u', 'refusals': 'aa{sv}'}


class StartTask(Protocol):
    """The owner of the tasks: TaskGroup.create_task, or that of a queue."""

    def __call__(self, coro: Coroutine[Any, Any, None], *, name: str | None = None) -> asyncio.Task[None]: ...


async def nobody(sender: str, uid: int) -> bool:
    """Let no one but root see other users' objects."""
    return False


class Router:
    """Serve the calls of a connection, each in a task of `spawn`, and send the signals of the exported objects.

    sees_all: whether a caller other than root may also see other users' objects. nodes: paths that always exist.
    """

    def __init__(self, connection: Connection, spawn: StartTask, root: str, sees_all: SeesAll = nobody,
                 nodes: Sequence[str] = ()) -> None:
        self.connection, self.peers, self.root = connection, Peers(connection), root
        self._spawn, self._sees_all = spawn, sees_all
        self._intake = Intake(self._begin, self._turn_away)
        self._quiet = asyncio.Event()           # set while no call is in flight
        self._quiet.set()
        self._long = Slots(LONG, 1)
        self._flooding: set[str] = set()        # senders whose calls are refused until they wait for replies
        self.last_call = asyncio.get_running_loop().time()
        self._changes = Changes(self.emit)
        self.registry = Registry(common=(properties := Properties(), introspectable := Introspectable()),
                                 anywhere=(introspectable, PeerInterface()), nodes=nodes)
        self.manager = ObjectManager(self.registry, root)
        properties.registry = introspectable.registry = self.registry
        self._adopt(root, self.manager)
        connection.on_call, connection.admit, connection.key_of = self.route, self.admit, self._intake.key_of
        connection.on_lost.append(self._lost)

    def export(self, path: str, *exported: Exported) -> None:
        """Export these interfaces as one object. Subscribers get InterfacesAdded, from the root path."""
        for one in exported:
            self._adopt(path, one)
        self.manager.added(path, exported)

    def unexport(self, path: str) -> None:
        """Remove the object. Its pending changes are sent before InterfacesRemoved."""
        self._changes.flush(path)
        gone = self.registry.remove(path)
        for one in gone:
            one.emitter = None
        self.manager.removed(path, gone)

    def views_changed(self) -> None:
        """Ask again which senders may see other users' objects."""
        if again := self.peers.forget_views():
            self._spawn(self._look_again(again), name='views of senders')

    async def remember(self, senders: Sequence[str], viewers: Sequence[str]) -> None:
        """Treat these senders as if they had called, and the viewers as if they had looked at other users' objects."""
        await asyncio.gather(*(self._remember(sender) for sender in senders))
        self._spawn(self._look_again(viewers), name='views of senders')

    async def _remember(self, sender: str) -> None:
        with contextlib.suppress(PermissionDenied):     # it has left
            await self.peers.uid(sender)

    async def _look_again(self, senders: Sequence[str]) -> None:
        for sender in senders:
            with contextlib.suppress(PermissionDenied):
                await self.peers.viewer(sender, self._sees_all)

    def _lost(self) -> None:
        for message in self._intake.clear():
            message.fds.close()
        self._changes.close()
        self.peers.close()

    def _adopt(self, path: str, exported: Exported) -> None:
        if not wire.is_object_path_valid(path):
            raise ValueError(f'{path!r} is not an object path')
        self.registry.add(path, exported)
        exported.path, exported.emitter = path, self

    @property
    def in_flight(self) -> int:
        """Number of calls that are not answered yet."""
        return self._intake.count

    async def quiet(self) -> None:
        """Wait until every call is answered."""
        await self._quiet.wait()

    def emit(self, path: str, interface: str, name: str, signature: str, values: Sequence[Any],
             types: Mapping[str, str] = NO_TYPES, audience: Audience | None = None) -> None:
        """Send a signal to all, or to each of the audience that has called before. It never waits. If the bus has not
        read for long, the signal is dropped and this is logged."""
        message = wire.make_signal(path, interface, name, signature, to_body(signature, values, types))
        try:
            if audience is None:
                self.connection.send(message)
            else:
                self.connection.send_to_each(message, self.peers.listeners(audience))
        except LimitsExceeded as error:
            log.error('signal %s of %s: %s', name, path, error)

    async def pause(self) -> None:
        """Pause between signals of many objects, so that other calls run and the bus reads what was sent."""
        await asyncio.sleep(0)
        await self.connection.drain()

    def properties_changed(self, path: str, exported: Exported, names: Sequence[str],
                           audience: Audience | None) -> None:
        self._changes.add(path, exported, names, audience)

    def admit(self, header: Received) -> bool:
        """Whether a call is let in. A call that is not is answered here."""
        error = self._intake.refusal(header)
        if error is None:
            return True
        self._turn_away(header, error)
        return False

    def _turn_away(self, message: Received, error: LimitsExceeded) -> None:
        """Answer a call that will not be served."""
        self._audit_flood(message)
        self.connection.refuse(message, _ready(error.message, error.hint))
        message.fds.close()

    def route(self, message: Received) -> None:
        """Serve a method call in a task. Its fds are closed when the task ends."""
        try:
            require_limits(message)
        except LimitsExceeded as error:
            self._audit_flood(message)
            self._fail(Call(message, self.peers, self._sees_all), error)
            message.fds.close()
            return
        self._quiet.clear()
        self._intake.put(message)

    def _begin(self, message: Received) -> None:
        call = Call(message, self.peers, self._sees_all)
        task = self._spawn(self.serve(call), name=str(call))
        task.add_done_callback(lambda _: self._finished(call))

    def _audit_flood(self, message: Received) -> None:
        """Log the refusal once and not with each call, so that a flood of calls does not flood the log."""
        if message.sender not in self._flooding:
            self._flooding.add(message.sender)
            self._audit(message, 'refused', 'limits')

    async def _find(self, call: Call) -> tuple[Exported, Method]:
        """Find the method that is meant, at an object that the caller may see. The body is decoded only afterwards."""
        message = call.message
        viewer = await call.viewer(lambda viewer: self.registry.sees(viewer, message.path))
        if self.registry.at(message.path) and not self.registry.sees(viewer, message.path):
            self._audit(message, 'refused', 'not theirs to see')
        exported, row = self.registry.find(message.path, message.interface, message.member, viewer)
        if message.signature != row.in_signature:
            raise DBusError(f'{ERROR}InvalidArgs',
                            f'{row.name} takes "{row.in_signature}", not "{message.signature}"')
        return exported, row

    async def serve(self, call: Call) -> None:
        """Run the handler and answer, whatever happens. If it is cancelled, `_finished` answers."""
        try:
            uid = await self.peers.uid(call.sender)
            self._intake.belongs_to(call.message, uid)
            exported, row = await self._find(call)
            self._follow(call.sender, call.message.path)
            if row.long:
                await call.viewer()     # this may ask polkit; do so before taking a slot
            async with self._long.slot(uid) if row.long else contextlib.nullcontext():
                await self._work(call, exported, row, uid)
        except LimitsExceeded as error:
            self._audit(call.message, 'refused', error.resource or 'limits')
            self._fail(call, error)
        except (DBusError, CkptError) as error:
            self._fail(call, error)
        except Exception:
            # Send no text and no traceback: they say more about the daemon than a caller should know.
            log.exception('%s failed', call)
            self._fail(call, CkptError('internal error', hint='see the log of the daemon'))
        await self.connection.drain(call.sender)

    async def _work(self, call: Call, exported: Exported, row: Method, uid: int) -> None:
        result = await row.handler(exported, call, *self._arguments(call.message))
        if not call.audited and not exported.interface.startswith(STANDARD):
            self._audit(call.message, 'allowed', 'everybody')
        if row.out_signature == 'o':
            self._follow(call.sender, result)
        await self._reply(call, row, result, uid)

    def _audit(self, message: Received, decision: Literal['allowed', 'refused'], rule: str) -> None:
        peer = self.peers.get(message.sender)
        audit(decision, rule, method=message.member, uid=peer.uid if peer else -1, pid=peer.pid if peer else 0,
              sender=message.sender, label=peer.label if peer else '', what=message.path)

    def _follow(self, sender: str, path: str) -> None:
        """Add a follower: a connection that has the path of an object, or calls it, gets its signals from now on."""
        audience = self.registry.audience(path)
        if audience is not None and audience.followers is not None:
            audience.followers.intersection_update(self.peers.senders)      # drop followers that have left the bus
            audience.followers.add(sender)

    @staticmethod
    def _arguments(message: Received) -> list[Any]:
        try:
            return message.body()
        except ProtocolError as error:
            raise InvalidArgument(str(error)) from error

    async def _reply(self, call: Call, row: Method, result: Any, uid: int) -> None:
        fds: list[int] = []

        def make() -> Message:
            values = (result,) if len(row.outputs) == 1 else result or ()
            body = to_body(row.out_signature, index_fds(list(values), fds) if 'h' in row.out_signature else values,
                           row.types)
            return wire.make_return(call.message, row.out_signature, body)

        try:
            if call.answered:
                return
            if not is_large(result, LARGE):
                self.connection.send(make(), fds)
            else:
                async with contextlib.nullcontext() if row.long else self._long.slot(uid):
                    await self.connection.send_large(make)
            call.answered = True
        finally:
            if isinstance(result, UnixFd):      # the caller has a duplicate, or will never have one
                os.close(result)

    def _fail(self, call: Call, error: DBusError | CkptError) -> None:
        if call.answered:
            return
        if isinstance(error, CkptError):
            name, signature, body = error.dbus_name, 'sa{sv}', to_body('sa{sv}', error_body(error), ERROR_TYPES)
        else:
            name, signature, body = error.name, 's', [error.message]
        try:
            self.connection.send(wire.make_error(call.message, name, signature, body))
            call.answered = True
        except LimitsExceeded as error:     # the error has too many refusals
            self._fail(call, error)

    def _finished(self, call: Call) -> None:
        """Finish a call. If its task was cancelled, perhaps before it began, answer now, since the caller would wait
        for ever."""
        self.last_call = asyncio.get_running_loop().time()
        self._intake.finished(call.message)
        if not self._intake.has(call.sender):
            self._flooding.discard(call.sender)
        call.message.fds.close()
        self._fail(call, Cancelled('the daemon stops'))
        if not self._intake.count:
            self._quiet.set()


@functools.lru_cache(64)
def _ready(words: str, hint: str) -> ReadyError:
    error = LimitsExceeded(words, hint=hint)
    return wire.ready_error(error.dbus_name, 'sa{sv}', to_body('sa{sv}', error_body(error), ERROR_TYPES))


def error_body(error: CkptError) -> tuple[str, dict[str, Any]]:
    """Return (sentence, details) of an error message."""
    return error.message, error.details()
