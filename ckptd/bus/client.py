# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the bus: calls that raise CkptError, and signals of one service in order.

    async with await connect('system') as client:
        async with client.signals(BUS_NAME, ROOT) as signals:       # before the call, so that none is missed
            job = await client.call(BUS_NAME, ROOT, MANAGER, 'Checkpoint', 'sa{sv}', 'pid:42', {'after': 'kill'})
            async for signal in signals:
                print(signal.path, signal.interface, signal.member, signal.args)
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, Self

from ckptd.bus import wire
from ckptd.bus.connection import DRIVER, DRIVER_PATH, ERROR, PEER, PROPERTIES, TIMEOUT, Connection, Match, Subscription
from ckptd.bus.message import NO_REPLY_EXPECTED, DBusError, ProtocolError, UnixFd
from ckptd.bus.names import BUS_NAME, job_path
from ckptd.bus.values import NO_TYPES, index_fds, split_signature, to_body
from ckptd.bus.wire import Received
from ckptd.errors import (
    ERROR_PREFIX,
    CkptError,
    InvalidArgument,
    LimitsExceeded,
    NoSuchImage,
    NoSuchJob,
    NoSuchTarget,
    NotSupported,
    PermissionDenied,
    Unavailable,
    from_details,
)

# errors of the bus and of systemd, as ckptd's; all others become CkptError
_OTHERS: Final[Mapping[str, type[CkptError]]] = {
    f'{ERROR}ServiceUnknown': Unavailable,
    f'{ERROR}NameHasNoOwner': Unavailable,
    f'{ERROR}NoReply': Unavailable,             # the service died while it worked on the call
    f'{ERROR}Timeout': Unavailable,
    f'{ERROR}Disconnected': Unavailable,
    f'{ERROR}AccessDenied': PermissionDenied,
    f'{ERROR}InteractiveAuthorizationRequired': PermissionDenied,
    f'{ERROR}InvalidArgs': InvalidArgument,
    f'{ERROR}UnknownMethod': NotSupported,
    f'{ERROR}UnknownInterface': NotSupported,
    f'{ERROR}NotSupported': NotSupported,
    f'{ERROR}LimitsExceeded': LimitsExceeded,
    'org.freedesktop.systemd1.NoSuchUnit': NoSuchTarget,
}
_JOBS = job_path(0).removesuffix('0')


@dataclass(frozen=True, slots=True)
class ReceivedSignal:
    """One signal with plain arguments."""
    path: str
    interface: str
    member: str
    args: tuple[Any, ...]

    @classmethod
    def of(cls, message: Received) -> Self:
        """Make a signal from a message. ProtocolError for a malformed body."""
        return cls(message.path, message.interface, message.member, tuple(message.body()))


class Sink(Protocol):
    """A receiver of signals. It learns once why no more will come.

    left(reason): the owner of the service's name is gone. Return True to hear the next owner, too, or False to end.
    """

    def add(self, signal: ReceivedSignal) -> None: ...
    def left(self, reason: str) -> bool: ...
    def end(self, reason: str) -> None: ...


class Signals:
    """Signals in the order they came. Raises Unavailable when the bus or the service is gone.

    follow: continue with the next owner of the service's name.
    """

    def __init__(self, *, follow: bool = False) -> None:
        self._follow = follow
        self._queue: asyncio.Queue[ReceivedSignal | CkptError] = asyncio.Queue()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ReceivedSignal:
        item = await self._queue.get()
        if isinstance(item, CkptError):
            raise item
        return item

    def add(self, signal: ReceivedSignal) -> None:
        self._queue.put_nowait(signal)

    def left(self, reason: str) -> bool:
        if not self._follow:
            self.end(reason)
        return self._follow

    def end(self, reason: str) -> None:
        self._queue.put_nowait(Unavailable(reason))


class _Owners:
    """Subscriptions of a sink to the owner of a name and, if the sink wants that, to each later owner."""

    def __init__(self, connection: Connection, sink: Sink, name: str, match: Match) -> None:
        self._connection, self._sink, self._name, self._match = connection, sink, name, match
        self._heard: Subscription | None = None
        self._over = False

    async def begin(self, owner: str) -> None:
        """Subscribe to this owner."""
        match = replace(self._match, sender=owner)
        self._heard = self._connection.expect(match, self._add)
        await self._connection.driver('AddMatch', 's', match.rule())

    def changed(self, message: Received) -> None:
        """Handle NameOwnerChanged. Signals of the next owner come after it. Some of them go only to connections that
        have called that owner."""
        _, old, new = message.body()
        if self._heard is None or self._over:
            return
        if old:
            self._over = not self._sink.left(f'{self._name} has left the bus')
        if new and not self._over and new != self._heard.match.sender:
            self._heard.cancel()
            self._heard = self._connection.expect(replace(self._match, sender=new), self._add)
            self._connection.send(wire.make_call(new, self._match.path_namespace or '/', PEER, 'Ping', '', [],
                                                 NO_REPLY_EXPECTED))

    def close(self) -> None:
        if self._heard is not None:
            self._heard.cancel()

    def _add(self, message: Received) -> None:
        self._sink.add(ReceivedSignal.of(message))


class Client:
    """Calls of one connection. The module's docstring has an example."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.connection.close()

    async def close(self) -> None:
        await self.connection.close()

    async def call(self, destination: str, path: str, interface: str, member: str, signature: str = '', *args: Any,
                   timeout: float = TIMEOUT,  # noqa: ASYNC109 - part of the call
                   types: Mapping[str, str] = NO_TYPES, flags: int = 0) -> Any:
        """Call a method. Return its only result, None if it has none, or a tuple of several.

        Values are plain. An 'h' is an open fd, and in a variant an Fd. types: D-Bus types for the keys of a{sv}
        arguments. flags: message flags. Raises the CkptError that the method answers with.
        """
        values = await self._values(destination, path, interface, member, signature, args, timeout, types, flags)
        return None if not values else values[0] if len(values) == 1 else tuple(values)

    async def call_for_fd(self, destination: str, path: str, interface: str, member: str, signature: str = '',
                          *args: Any, timeout: float = TIMEOUT,  # noqa: ASYNC109 - part of the call
                          flags: int = 0) -> int:
        """Call a method whose only result is an 'h'. Return the open fd, which the caller closes."""
        values = await self._values(destination, path, interface, member, signature, args, timeout, NO_TYPES, flags,
                                    take=True)
        if len(values) != 1 or not isinstance(values[0], UnixFd):
            raise CkptError(f'{member} of {destination} did not return a file descriptor')
        return int(values[0])

    async def _values(self, destination: str, path: str, interface: str, member: str, signature: str,
                      args: Sequence[Any], timeout: float,  # noqa: ASYNC109 - part of the call
                      types: Mapping[str, str], flags: int, *, take: bool = False) -> list[Any]:
        """Return the body of the reply. take: if its first value is an fd, that fd stays open."""
        indexed, fds = _index_fds(signature, args)
        message = wire.make_call(destination, path, interface, member, signature, to_body(signature, indexed, types),
                                 flags)
        try:
            reply = await self.connection.request(message, timeout=timeout, fds=fds)
            try:
                values = reply.body()
                if take and values and isinstance(values[0], UnixFd):
                    reply.fds.take(values[0])
                return values
            finally:
                reply.fds.close()
        except DBusError as error:
            raise as_ckpt_error(error, path) from error
        except ProtocolError as error:
            raise CkptError(f'{destination} sent a malformed reply: {error}') from error

    async def properties(self, destination: str, path: str, interface: str) -> dict[str, Any]:
        """Read all properties of one interface of an object."""
        return dict(await self.call(destination, path, PROPERTIES, 'GetAll', 's', interface))

    async def property_(self, destination: str, path: str, interface: str, name: str) -> Any:
        return await self.call(destination, path, PROPERTIES, 'Get', 'ss', interface, name)

    async def owner(self, name: str, *, start: bool = False) -> str:
        """Return the unique name of the owner of a name. start: let the bus start the service if possible. Unavailable
        if there is no owner."""
        if start:
            await self.call(DRIVER, DRIVER_PATH, DRIVER, 'StartServiceByName', 'su', name, 0)
        return str(await self.call(DRIVER, DRIVER_PATH, DRIVER, 'GetNameOwner', 's', name))

    @contextlib.asynccontextmanager
    async def signals(self, service: str, path_namespace: str = '', interface: str = '',
                      member: str = '') -> AsyncIterator[Signals]:
        """Receive the signals of this service, from its present owner only, until the context ends."""
        signals = Signals()
        async with self.listening(signals, service, path_namespace, interface, member):
            yield signals

    @contextlib.asynccontextmanager
    async def listening(self, sink: Sink, service: str, path_namespace: str = '', interface: str = '',
                        member: str = '') -> AsyncIterator[None]:
        """Deliver the signals of this service to a sink until the context ends. The sink may go on with the next
        owner."""
        if not await self._is_there(service):
            await self.owner(service, start=True)
        owners = _Owners(self.connection, sink, service, Match('', interface, member, path_namespace=path_namespace))

        def lost() -> None:
            sink.end('the bus is gone')

        with contextlib.ExitStack() as stack:
            stack.callback(owners.close)
            watch = await self.connection.subscribe(
                Match(DRIVER, DRIVER, 'NameOwnerChanged', DRIVER_PATH, arg0=service), owners.changed)
            stack.callback(watch.cancel)
            await owners.begin(await self.owner(service))
            self.connection.on_lost.append(lost)
            stack.callback(self.connection.on_lost.remove, lost)
            try:
                # ckptd sends some signals only to connections that have called it and may see the object
                await self.call(service, path_namespace or '/', PEER, 'Ping')
            except Unavailable:
                sink.end(f'{service} has left the bus')
            except CkptError:
                pass        # the service is there, even if it does not answer Ping
            yield

    async def _is_there(self, name: str) -> bool:
        return bool(await self.call(DRIVER, DRIVER_PATH, DRIVER, 'NameHasOwner', 's', name))


async def connect(bus: str, *, timeout: float = TIMEOUT) -> Client:  # noqa: ASYNC109 - of several steps
    """Connect to 'system', 'session' or an address. Unavailable if there is no bus."""
    return Client(await Connection.open(bus, timeout=timeout))


def as_ckpt_error(error: DBusError, path: str = '') -> CkptError:
    """Convert an error answer to ckptd's class for it. path: the object that was called."""
    details = error.body[1] if len(error.body) > 1 and isinstance(error.body[1], dict) else {}
    if error.name.startswith(ERROR_PREFIX):
        return from_details(error.name, error.message, details)
    if error.name == f'{ERROR}UnknownObject':
        if path.startswith(_JOBS):
            return NoSuchJob(f'no job {path.removeprefix(_JOBS)}: it ended a while ago and was removed')
        return NoSuchImage(error.message)
    kind = Unavailable if error.name.startswith(f'{ERROR}Spawn.') else _OTHERS.get(error.name, CkptError)
    text = error.message if kind is not CkptError else f'{error.name}: {error.message}'
    return kind(text, hint=_hint(error, kind))


def _hint(error: DBusError, kind: type[CkptError]) -> str | None:
    """Return a hint for the error, or None to use the default hint of its class."""
    if error.name == f'{ERROR}InteractiveAuthorizationRequired':
        return 'call from a terminal or a desktop session, where polkit can ask, or as root'
    if error.name.startswith(f'{ERROR}Spawn.') or 'activate' in error.message:
        return 'the daemon does not start: see "journalctl -u ckptd"'
    return None if kind is not Unavailable or BUS_NAME in error.message else ''


def _index_fds(signature: str, args: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Replace each 'h' by its index into the fds of the message."""
    fds: list[int] = []
    values = [index_fds(UnixFd(value) if kind == 'h' else value, fds)
              for kind, value in zip(split_signature(signature), args, strict=True)]
    return values, fds
