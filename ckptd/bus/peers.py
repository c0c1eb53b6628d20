# SPDX-License-Identifier: LGPL-2.1-or-later
"""Credentials of senders on the bus, as the bus and the kernel report them.

Authorization uses the uid and groups of the connection, which come from the bus. The pid only names a process: that
process may be dead and its pid reused. So the pid is turned into a pidfd, and then the bus is asked again.
"""

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from ckptd.bus import wire
from ckptd.bus.connection import DRIVER, DRIVER_PATH, Connection, Match, Subscription
from ckptd.bus.export import Audience, Viewer
from ckptd.bus.message import DBusError, ProtocolError
from ckptd.bus.wire import Received
from ckptd.errors import LimitsExceeded, PermissionDenied
from ckptd.kernel.confinement import (
    NO_NEW_PRIVS,
    SECCOMP,
    UNKNOWN,
    Restrictions,
    confinement,
    machine_restrictions,
    own_restrictions,
    restrictions_of,
)
from ckptd.kernel.pidfd import pidfd_open, pidfd_start_time, wait_dead
from ckptd.kernel.status import Status, read_status
from ckptd.kernel.task import read_namespaces
from ckptd.protocol.requests import Caller

log = logging.getLogger(__name__)

MAX_PEERS: Final = 400      # remembered; each costs a pidfd and a match rule, of which a bus allows some 512
MAX_OF_USER: Final = 100    # of one user other than root; a signal goes to each that may hear it and takes some 50 us
ATTEMPTS: Final = 3         # attempts to learn what a sender may see while that changes
VIEW_LIFE: Final = 30.0     # seconds for which the view of a sender holds, unless polkit reports a change
NOBODY: Final = 65534       # /proc/sys/kernel/overflowgid


SeesAll = Callable[[str, int], Awaitable[bool]]     # whether a sender with this uid may also see other users' objects


@dataclass(slots=True, eq=False)
class Peer:
    """A connection on the bus."""
    sender: str
    uid: int = -1
    label: str = ''    # label of the kernel's security module, '' without one
    groups: tuple[int, ...] = ()
    pid: int = 0
    pidfd: int = -1           # of the connection's process; -1 if that is gone or unknown
    watch: Subscription | None = None
    sees_all: bool = False    # the last answer on whether it sees other users' objects, too
    view_ends: float = 0.0    # time of the loop's clock after which sees_all must be asked again
    viewed: bool = False      # sees_all was asked at least once
    lookup: asyncio.Lock = field(default_factory=asyncio.Lock)
    on_gone: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """Forget the process and stop watching the name."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if self.watch is not None:
            self.watch.cancel()

    def status(self) -> Status | None:
        """Read /proc/PID/status of exactly this process, or return None if it is gone or now has another uid."""
        if self.pidfd < 0:
            return None
        try:
            status = read_status(self.pid)
        except (OSError, ValueError, KeyError):
            return None
        # the process is alive after the file was read, so the number was not another process's in between
        return None if wait_dead(self.pidfd, 0) or status.uids[1] != self.uid else status

    def confinement(self, status: Status, base: Restrictions) -> tuple[str, ...]:
        """Return what confines exactly this process, whose status is given, beyond `base`."""
        try:
            namespaces = read_namespaces(self.pid)
        except OSError:
            # it is ending, or a security module denies the look: treat it as confined by all of them
            namespaces = {}
        return UNKNOWN if wait_dead(self.pidfd, 0) else confinement(restrictions_of(status, namespaces), base)


class Peers:
    """Senders that have called. Each is remembered until it leaves the bus."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: dict[str, Peer] = {}
        self._asked: dict[str, asyncio.Event] = {}      # senders that are being looked up
        self._views = 0         # number of calls of forget_views
        self._base: Restrictions | None = None

    @property
    def base(self) -> Restrictions:
        """The restrictions of an unconfined caller: those that all processes of the machine begin with or, for a user's
        own daemon, its own."""
        if self._base is None:
            self._base = own_restrictions() if os.geteuid() else machine_restrictions()
        return self._base

    def set_base(self, base: Restrictions) -> None:
        self._base = base

    async def caller(self, sender: str) -> Caller:
        """Return the present credentials of the sender. PermissionDenied when it has left the bus."""
        peer = await self._peer(sender)
        status = peer.status()
        gid = peer.groups[0] if peer.groups else NOBODY
        if status is None:
            return Caller(peer.uid, gid, peer.groups, 0, -1, label=peer.label, confinement=UNKNOWN)
        confined = peer.confinement(status, self.base)
        # Leave out what the process gained by running a program since. The effective group and capabilities of a
        # program with set-group-ID or file capabilities do not belong to the user of this connection.
        if not peer.groups or status.gids[0] in peer.groups:
            gid = status.gids[0]
        return Caller(peer.uid, gid, peer.groups or status.groups, peer.pid, 0 if peer.uid else status.cap_eff,
                      status.cap_bnd, NO_NEW_PRIVS in confined, SECCOMP in confined, peer.label,
                      pidfd_start_time(peer.pidfd, peer.pid), confinement=confined)

    @property
    def senders(self) -> list[str]:
        """Return the known senders, the oldest first."""
        return list(self._known)

    @property
    def viewers(self) -> list[str]:
        """Return the senders whose view was asked."""
        return [peer.sender for peer in self._known.values() if peer.viewed]

    def get(self, sender: str) -> Peer | None:
        """Return the peer if it is known already."""
        return self._known.get(sender)

    async def uid(self, sender: str) -> int:
        """Return the uid of the connection. PermissionDenied when it has left the bus."""
        return (await self._peer(sender)).uid

    async def viewer(self, sender: str, ask: 'SeesAll') -> Viewer:
        """Return what the sender may see. The answer holds for a while. If there is none yet, the sender sees its own
        objects only."""
        peer = await self._peer(sender)
        if peer.uid == 0:
            return Viewer(0, True)
        now = asyncio.get_running_loop().time
        async with peer.lookup:        # many calls at once ask one question
            for _ in range(ATTEMPTS):
                if peer.view_ends > now():
                    break
                peer.viewed, asked = True, self._views
                try:
                    answer = await ask(sender, peer.uid)
                except LimitsExceeded:
                    return Viewer(peer.uid)
                if asked == self._views:        # otherwise the answer was overtaken by a change
                    peer.sees_all, peer.view_ends = answer, now() + VIEW_LIFE
            return Viewer(peer.uid, peer.sees_all)

    def forget_views(self) -> list[str]:
        """Drop the answers about what senders may see, because these may have changed. Return the senders to ask
        again."""
        self._views += 1
        for peer in self._known.values():
            peer.sees_all, peer.view_ends = False, 0.0
        return self.viewers

    def listeners(self, audience: Audience) -> list[str]:
        """Return the senders that have called and may hear signals for this audience."""
        wanted = self._known if audience.followers is None else audience.followers & self._known.keys()
        return [sender for sender in wanted if (peer := self._known[sender]).uid in (0, audience.uid)
                or peer.sees_all or sender in audience.senders]

    async def when_gone(self, sender: str, callback: Callable[[], None]) -> None:
        """Call back once when the sender leaves the bus, or at once if it has left."""
        try:
            peer = await self._peer(sender)
        except PermissionDenied:
            callback()
        else:
            peer.on_gone.append(callback)

    def never_mind(self, sender: str, callback: Callable[[], None]) -> None:
        """Cancel a callback of `when_gone`."""
        peer = self._known.get(sender)
        if peer is not None and callback in peer.on_gone:
            peer.on_gone.remove(callback)

    def close(self) -> None:
        for peer in self._known.values():
            peer.close()
        self._known.clear()

    async def _peer(self, sender: str) -> Peer:
        while (asked := self._asked.get(sender)) is not None:  # several calls of one sender at once ask one question
            await asked.wait()
        if (known := self._known.get(sender)) is not None:
            return known
        peer, asked = Peer(sender), asyncio.Event()
        self._asked[sender] = asked
        try:
            await self._ask(peer)
        except BaseException:
            peer.close()
            raise
        finally:
            del self._asked[sender]
            asked.set()
        self._make_room(peer.uid)
        self._known[sender] = peer
        return peer

    async def _ask(self, peer: Peer) -> None:
        gone = asyncio.Event()

        def left(message: Received) -> None:
            if message.body()[2] == '':
                gone.set()
                self._left(peer)

        # subscribe before asking, so that a sender who leaves after the answer is noticed
        peer.watch = await self._connection.subscribe(
            Match(DRIVER, DRIVER, 'NameOwnerChanged', DRIVER_PATH, arg0=peer.sender), left)
        try:
            await self._fill(peer)
        except (DBusError, ProtocolError) as error:
            raise PermissionDenied(f'the bus does not know the caller {peer.sender}: {error}') from error
        if gone.is_set():
            raise PermissionDenied(f'the caller {peer.sender} has left the bus')

    async def _fill(self, peer: Peer) -> None:
        facts = await self._credentials(peer)
        peer.uid = int(facts['UnixUserID'])
        peer.groups = tuple(facts.get('UnixGroupIDs', ()))
        peer.pid = int(facts.get('ProcessID', 0))
        peer.label = bytes(facts.get('LinuxSecurityLabel', b'')).rstrip(b'\0').decode(errors='replace')
        if peer.pidfd < 0 and peer.pid:
            with contextlib.suppress(OSError):      # the process is dead already; the pidfd stays -1
                peer.pidfd = pidfd_open(peer.pid)
            again = await self._credentials(Peer(peer.sender))
            if (again.get('ProcessID'), again.get('UnixUserID')) != (peer.pid, peer.uid):
                raise PermissionDenied(f'the caller {peer.sender} changed while it was looked up')

    async def _credentials(self, peer: Peer) -> dict[str, Any]:
        """Return the credentials from the bus. ProcessFD, where the bus has it, is a pidfd without any race."""
        reply = await self._connection.request(wire.make_call(
            DRIVER, DRIVER_PATH, DRIVER, 'GetConnectionCredentials', 's', [peer.sender]))
        try:
            facts: dict[str, Any] = reply.body()[0]
            if 'ProcessFD' in facts:
                peer.pidfd = reply.fds.take(facts['ProcessFD'])
            return facts
        finally:
            reply.fds.close()

    def _left(self, peer: Peer) -> None:
        if self._known.get(peer.sender) is peer:
            del self._known[peer.sender]
        peer.close()
        for callback in peer.on_gone:
            try:
                callback()
            except Exception:
                # An error in ckptd. The remaining callbacks still run.
                log.exception('a callback failed after %s left the bus', peer.sender)

    def _make_room(self, newcomer: int) -> None:
        """Keep the table small. The user with the most connections loses the oldest one, which gets no signals until it
        calls again. A connection that something waits for is kept."""
        counts = Counter(peer.uid for peer in self._known.values())
        if (newcomer and counts[newcomer] >= MAX_OF_USER) or len(self._known) >= MAX_PEERS:
            uid = newcomer if newcomer and counts[newcomer] >= MAX_OF_USER else counts.most_common(1)[0][0]
            peer = next((peer for peer in self._known.values() if peer.uid == uid and not peer.on_gone), None)
            if peer is not None:
                log.warning('uid %d has many connections: %s gets no signals until it calls again', uid, peer.sender)
                del self._known[peer.sender]
                peer.close()
