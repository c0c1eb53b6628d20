# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to a message bus: outgoing calls with a timeout, incoming calls passed on, signals by match rule."""

import asyncio
import logging
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Self

from ckptd.bus import wire
from ckptd.bus.message import NO_REPLY_EXPECTED, DBusError, MessageType, ProtocolError
from ckptd.bus.stream import UNWANTED, MessageReader
from ckptd.bus.turns import Key
from ckptd.bus.values import to_body
from ckptd.bus.wire import AuthError, Message, ReadyError, Received
from ckptd.bus.writer import MessageWriter
from ckptd.errors import Busy, Unavailable

log = logging.getLogger(__name__)

DRIVER: Final = 'org.freedesktop.DBus'
DRIVER_PATH: Final = '/org/freedesktop/DBus'
ERROR: Final = 'org.freedesktop.DBus.Error.'
PROPERTIES: Final = 'org.freedesktop.DBus.Properties'
PEER: Final = 'org.freedesktop.DBus.Peer'
MAX_REPLY: Final = 128 << 20        # no message is longer (D-Bus specification)
SEND_BUFFER: Final = 4 << 10        # bytes; the kernel doubles it (socket(7))
TIMEOUT: Final = 25.0               # seconds, the same as in libdbus and sd-bus

DO_NOT_QUEUE: Final = 4
PRIMARY_OWNER, ALREADY_OWNER = 1, 4


@dataclass(frozen=True, slots=True)
class Match:
    """A match rule for signals. sender: a unique name or the bus itself. An empty field matches everything."""
    sender: str = ''
    interface: str = ''
    member: str = ''
    path: str = ''
    path_namespace: str = ''
    arg0: str = ''

    def rule(self) -> str:
        """Return the rule in the syntax of AddMatch."""
        return ','.join(["type='signal'"] + [f"{key.name}='{value}'" for key in fields(self)
                                             if (value := getattr(self, key.name))])

    def fits(self, message: Received) -> bool:
        """Whether the signal matches. The bus also delivers signals that are addressed to us and match no rule."""
        for name in ('sender', 'interface', 'member', 'path'):
            wanted = getattr(self, name)
            if wanted and wanted != getattr(message, name):
                return False
        below = self.path_namespace
        if below and message.path != below and not message.path.startswith(below.rstrip('/') + '/'):
            return False
        return not self.arg0 or (message.signature.startswith('s') and message.body()[0] == self.arg0)


@dataclass(frozen=True, slots=True, eq=False)
class Subscription:
    """Signals that match go to callback(message) until cancel()."""
    connection: 'Connection'
    match: Match
    callback: Callable[[Received], None]

    def cancel(self) -> None:
        """End the callbacks. A second call does nothing."""
        if self.connection.forget(self):
            # A rule that stays counts against max_match_rules_per_connection, 512 on many buses.
            self.connection.send(wire.make_call(DRIVER, DRIVER_PATH, DRIVER, 'RemoveMatch', 's', [self.match.rule()],
                                                NO_REPLY_EXPECTED))


class Connection:
    """A connection, made by `open`. on_call gets every method call and must close its fds.

    No call waits for ever: it is answered, times out, or fails when the connection is lost.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)       # small: its content has no turns
        self._sock = sock
        self.inode = os.fstat(sock.fileno()).st_ino     # sock_diag(7) identifies the socket by its inode
        self._loop = asyncio.get_running_loop()
        self._reader = MessageReader(sock, self._limit)
        self._writer = MessageWriter(sock, self._lost)
        self._pending: dict[int, tuple[str, asyncio.Future[Received]]] = {}
        self._by_sender: defaultdict[str, list[Subscription]] = defaultdict(list)
        self._next_round: asyncio.Handle | None = None
        self._serial = 0
        self.connected = True
        self.error: Exception | None = None
        self.unique_name = ''
        self.on_call: Callable[[Received], None] | None = None
        # decides from the header whether a call is read; `admit` itself answers a call that it rejects
        self.admit: Callable[[Received], bool] = lambda header: True
        self.key_of: Callable[[str], Key] = lambda destination: ''      # the writer's queue for a destination
        self.on_lost: list[Callable[[], None]] = []
        self._loop.add_reader(sock, self._readable)

    @classmethod
    async def open(cls, bus: str, *, timeout: float = TIMEOUT) -> Self:  # noqa: ASYNC109 - of several steps
        """Connect to 'system', 'session' or an address and say Hello. Unavailable if there is no bus."""
        try:
            async with asyncio.timeout(timeout):
                connection = cls(await wire.open_socket(wire.resolve_address(bus)))
                try:
                    [connection.unique_name] = await connection.driver('Hello')
                except BaseException:
                    connection.abort()
                    raise
        except (OSError, AuthError, ValueError, DBusError) as error:
            raise Unavailable(f'cannot connect to the {bus} bus: {error}' if bus in ('system', 'session') else
                              f'cannot connect to the bus at {bus}: {error}', hint='is the bus running?') from error
        return connection

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Send the queued messages and disconnect. A second call does nothing."""
        if self.connected:
            try:
                async with asyncio.timeout(1):
                    await self._writer.flush()
            except TimeoutError:
                log.warning('the bus does not read; the queued messages are lost')
        self.abort()

    def abort(self) -> None:
        """Disconnect now."""
        self._lost(None)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue a message; its fds are duplicated. It is dropped if the connection is closed. ValueError for a bad
        body, LimitsExceeded for more than wire.MAX_SENT bytes."""
        if self.connected:
            message.serial, message.unix_fds = self._next_serial(), list(fds)
            self._writer.send(wire.marshal(message), fds, self.key_of(message.destination or ''))

    def refuse(self, call: Received, error: ReadyError) -> None:
        """Answer a call that `admit` rejected."""
        if call.wants_reply:
            self._writer.refuse(error.to(call, self._next_serial()), self.key_of(call.sender))

    def send_to_each(self, signal: Message, destinations: Sequence[str]) -> None:
        """Queue a signal for each destination. It is marshalled once. ValueError for a bad body."""
        if self.connected and destinations:
            data = wire.marshal(signal)
            for one in destinations:
                self._writer.send(wire.address(data, self._next_serial(), one), key=self.key_of(one))

    async def send_large(self, make: Callable[[], Message]) -> None:
        """Send a message that takes long to make and marshal (40 us for each row of a{sv}). A thread does both. Errors
        as for `send`."""
        serial = self._next_serial()

        def work() -> tuple[bytes, str]:
            message = make()
            message.serial = serial
            return wire.marshal(message), message.destination or ''

        data, destination = await asyncio.to_thread(work)
        if self.connected:
            self._writer.send(data, key=self.key_of(destination))

    def _next_serial(self) -> int:
        """Return the next serial number: 32 bits, never 0."""
        self._serial = self._serial % 0xFFFFFFFF + 1
        return self._serial

    async def drain(self, destination: str = '') -> None:
        """Wait until the bus has read most of what was sent: to all, or to this destination and others of its user."""
        await self._writer.drain(self.key_of(destination) if destination else None)

    async def call(self, destination: str, path: str, interface: str, member: str, signature: str = '',
                   body: Sequence[Any] = (), *, timeout: float = TIMEOUT,  # noqa: ASYNC109 - part of the call
                   fds: Sequence[int] = (), flags: int = 0) -> list[Any]:
        """Call a method and return plain values. An 'h' of the body is an index into fds. DBusError."""
        reply = await self.request(wire.make_call(destination, path, interface, member, signature,
                                                  to_body(signature, body), flags), timeout=timeout, fds=fds)
        try:
            return reply.body()
        finally:
            reply.fds.close()

    async def driver(self, member: str, signature: str = '', *args: Any) -> list[Any]:
        """Call a method of the bus itself. DBusError."""
        return await self.call(DRIVER, DRIVER_PATH, DRIVER, member, signature, args)

    async def request(self, message: Message, *, timeout: float = TIMEOUT,  # noqa: ASYNC109 - part of the call
                      fds: Sequence[int] = ()) -> Received:
        """Send a method call and return the reply. Its fds now belong to the caller. DBusError."""
        future: asyncio.Future[Received] = self._loop.create_future()
        self.send(message, fds)
        if not self.connected:      # lost before the call, or because of this message
            raise self._disconnected()
        serial = message.serial
        self._pending[serial] = message.destination, future
        try:
            async with asyncio.timeout(timeout):
                reply = await future
        except TimeoutError:
            raise DBusError(f'{ERROR}Timeout', f'no reply to {message.member} within {timeout} s') from None
        except asyncio.CancelledError:
            # The reply may have come at the same moment. Close its fds, since nothing else knows of them.
            if future.done() and not future.cancelled() and not future.exception():
                future.result().fds.close()
            raise
        finally:
            del self._pending[serial]
        if reply.type == MessageType.ERROR:
            raise error_of(reply)
        return reply

    def expect(self, match: Match, callback: Callable[[Received], None]) -> Subscription:
        """Call back for signals that match and that are addressed to us. No rule is sent to the bus."""
        subscription = Subscription(self, match, callback)
        self._by_sender[match.sender].append(subscription)
        return subscription

    async def subscribe(self, match: Match, callback: Callable[[Received], None]) -> Subscription:
        """Call back for signals that match. Their fds are closed when the callback returns."""
        subscription = self.expect(match, callback)
        try:
            await self.driver('AddMatch', 's', match.rule())
        except BaseException:
            self.forget(subscription)
            raise
        return subscription

    def forget(self, subscription: Subscription) -> bool:
        """End the callbacks without telling the bus. Return False if they had ended before."""
        some = self._by_sender.get(subscription.match.sender, [])
        if subscription not in some:
            return False
        some.remove(subscription)
        if not some:
            del self._by_sender[subscription.match.sender]
        return True

    @property
    def _subscriptions(self) -> list[Subscription]:
        return [one for some in self._by_sender.values() for one in some]

    async def request_name(self, name: str) -> None:
        """Take a name. Export everything first: calls may be waiting. Busy if another process has the name."""
        [code] = await self.driver('RequestName', 'su', name, DO_NOT_QUEUE)
        if code not in (PRIMARY_OWNER, ALREADY_OWNER):
            raise Busy(f'another process owns the name {name} on this bus', hint='stop it first, or use another bus')

    async def release_name(self, name: str) -> None:
        """Release a name. Calls sent to it before have arrived when this returns."""
        await self.driver('ReleaseName', 's', name)

    def _limit(self, message: Received) -> int:
        """Return how many bytes of the body are read. UNWANTED for messages that any client may send at any rate and
        that nothing here waits for."""
        if message.type in (MessageType.RETURN, MessageType.ERROR):
            return MAX_REPLY if self._waiting_for(message) else UNWANTED
        if message.type == MessageType.CALL:
            return wire.MAX_BODY if self.admit(message) else UNWANTED
        known = message.type == MessageType.SIGNAL and (message.sender in self._by_sender or '' in self._by_sender)
        return wire.MAX_BODY if known else UNWANTED

    def _waiting_for(self, message: Received) -> asyncio.Future[Received] | None:
        """Return the call that this reply answers. It must come from the called service, or from the bus for it."""
        destination, future = self._pending.get(message.reply_serial, ('', None))
        if future is None or future.done():
            return None
        # A well-known name has an owner that the call does not know. The bus lets only that owner reply.
        exact = destination == DRIVER or destination.startswith(':')
        instead = message.type == MessageType.ERROR and message.sender == DRIVER
        return future if instead or not exact or message.sender == destination else None

    def _readable(self) -> None:
        if self._next_round is None:        # else the scheduled round reads it
            self._read()

    def _read(self) -> None:
        self._next_round = None
        try:
            for message in self._reader.messages() if self.connected else ():
                self._dispatch(message)
                if not self.connected:
                    return
        except (OSError, EOFError, ProtocolError) as error:
            self._lost(error)
        if self.connected and self._reader.pending:        # messages in its buffer, which no selector reports
            self._next_round = self._loop.call_soon(self._read)

    def _dispatch(self, message: Received) -> None:
        if message.type == MessageType.CALL and self.on_call is not None:
            self.on_call(message)
            return
        if message.type in (MessageType.RETURN, MessageType.ERROR) and (future := self._waiting_for(message)):
            future.set_result(message)
            return
        try:
            if message.type == MessageType.SIGNAL and message.raw is not None:
                self._deliver(message)
            elif message.wants_reply:
                self.send(wire.make_error(message, f'{ERROR}UnknownObject', 's', ['nothing is exported here']))
        except ProtocolError as error:
            log.warning('signal %s of %s: %s', message.member, message.sender, error)
        finally:
            message.fds.close()

    def _deliver(self, message: Received) -> None:
        # Look up by sender: any client may send signals, and a comparison with each subscription takes too long.
        some = (*self._by_sender.get(message.sender, ()), *self._by_sender.get('', ()))
        for subscription in [one for one in some if one.match.fits(message)]:
            subscription.callback(message)

    def _lost(self, error: Exception | None) -> None:
        if not self.connected:
            return
        self.connected, self.error = False, error
        self._loop.remove_reader(self._sock)
        self._writer.close()
        self._reader.close()
        self._sock.close()
        for _, future in self._pending.values():
            if not future.done():
                future.set_exception(self._disconnected())
        for callback in self.on_lost:
            callback()

    def _disconnected(self) -> DBusError:
        return DBusError(f'{ERROR}Disconnected', f'not connected to the bus: {self.error or "closed"}')


def error_of(reply: Received) -> DBusError:
    """Convert an error message. Its fds are closed."""
    try:
        body = reply.body()
    except ProtocolError:
        body = []
    finally:
        reply.fds.close()
    text = body[0] if body and isinstance(body[0], str) else ''
    return DBusError(reply.error_name, text, body)
