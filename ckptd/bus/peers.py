# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of the bus: credentials of senders, as the bus and the kernel say.

The uid and groups are those of the connection, from the bus; authorization stands on them. The pid is only good for
naming a process: it may be dead and its number another's. So it is turned into a pidfd, and the bus is asked again.
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
from ckptd.protocol.messages import Caller

log = logging.getLogger(__name__)

MAX_PEERS: Final = 400      # remembered; each costs a match rule, of which a bus allows some 512, and a pidfd
MAX_OF_USER: Final = 100    # of these, but for root: a signal goes to each that may hear it, and takes some 50 us
ATTEMPTS: Final = 3         # to hear what a sender may see, while that changes
VIEW_LIFE: Final = 30.0     # seconds for which what a sender may see holds, unless polkit says that something changed
NOBODY: Final = 65534       # /proc/sys/kernel/overflowgid


SeesAll = Callable[[str, int], Awaitable[bool]]     # whether a sender with this uid may see what is others', too


@dataclass(slots=True, eq=False)
class Peer:
    """A connection on the bus. pidfd: of its process, -1 where that is gone or cannot be told. label: of the security
    module that the kernel has, '' without one. sees_all: also what is others', as was last heard; to be asked again
    after view_ends of the loop's clock. viewed: that was asked once."""
    sender: str
    uid: int = -1
    label: str = ''
    groups: tuple[int, ...] = ()
    pid: int = 0
    pidfd: int = -1
    watch: Subscription | None = None
    sees_all: bool = False
    view_ends: float = 0.0
    viewed: bool = False
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
        """/proc/PID/status of this very process, or None when it is gone or has another uid now."""
        if self.pidfd < 0:
            return None
        try:
            status = read_status(self.pid)
        except (OSError, ValueError, KeyError):
            return None
        # alive after the file was read: the number was not another's in between
        return None if wait_dead(self.pidfd, 0) or status.uids[1] != self.uid else status

    def confinement(self, status: Status, base: Restrictions) -> tuple[str, ...]:
        """What keeps this very process, whose status that is, from more than `base`."""
        try:
            namespaces = read_namespaces(self.pid)
        except OSError:
            namespaces = {}     # it ends, or a security module does not let us look: then it is confined by all of them
        return UNKNOWN if wait_dead(self.pidfd, 0) else confinement(restrictions_of(status, namespaces), base)


class Peers:
    """Senders that have called, remembered until they leave the bus."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: dict[str, Peer] = {}
        self._asked: dict[str, asyncio.Event] = {}      # who is being asked about
        self._views = 0         # how often forget_views was called
        self._base: Restrictions | None = None

    @property
    def base(self) -> Restrictions:
        """What a caller who is not confined has: what the machine's processes begin with, or one's own for a daemon
        that is its user's alone."""
        if self._base is None:
            self._base = own_restrictions() if os.geteuid() else machine_restrictions()
        return self._base

    def set_base(self, base: Restrictions) -> None:
        self._base = base

    async def caller(self, sender: str) -> Caller:
        """Who this sender is now. PermissionDenied when it has left the bus."""
        peer = await self._peer(sender)
        status = peer.status()
        gid = peer.groups[0] if peer.groups else NOBODY
        if status is None:
            return Caller(peer.uid, gid, peer.groups, 0, -1, label=peer.label, confinement=UNKNOWN)
        confined = peer.confinement(status, self.base)
        # not what it got by running a program since: effective group and capabilities of one with set-group-ID or file
        # capabilities are not its user's, who has this connection
        if not peer.groups or status.gids[0] in peer.groups:
            gid = status.gids[0]
        return Caller(peer.uid, gid, peer.groups or status.groups, peer.pid, 0 if peer.uid else status.cap_eff,
                      status.cap_bnd, NO_NEW_PRIVS in confined, SECCOMP in confined, peer.label,
                      pidfd_start_time(peer.pidfd, peer.pid), confinement=confined)

    @property
    def senders(self) -> list[str]:
        """Those that are known, the oldest first."""
        return list(self._known)

    @property
    def viewers(self) -> list[str]:
        """Those of whom it was asked what they may see."""
        return [peer.sender for peer in self._known.values() if peer.viewed]

    def get(self, sender: str) -> Peer | None:
        """If it is known already."""
        return self._known.get(sender)

    async def uid(self, sender: str) -> int:
        """Of the connection. PermissionDenied when it has left the bus."""
        return (await self._peer(sender)).uid

    async def viewer(self, sender: str, ask: 'SeesAll') -> Viewer:
        """What the sender may see. The answer holds for a while; where there is none for now, that is its own."""
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
                if asked == self._views:        # else it is that of yesterday
                    peer.sees_all, peer.view_ends = answer, now() + VIEW_LIFE
            return Viewer(peer.uid, peer.sees_all)

    def forget_views(self) -> list[str]:
        """What senders may see has changed, perhaps: those who were asked about, and are to be again."""
        self._views += 1
        for peer in self._known.values():
            peer.sees_all, peer.view_ends = False, 0.0
        return self.viewers

    def listeners(self, audience: Audience) -> list[str]:
        """Those who have called and may hear what is for this audience."""
        wanted = self._known if audience.followers is None else audience.followers & self._known.keys()
        return [sender for sender in wanted if (peer := self._known[sender]).uid in (0, audience.uid)
                or peer.sees_all or sender in audience.senders]

    async def when_gone(self, sender: str, callback: Callable[[], None]) -> None:
        """Call back once, when the sender leaves the bus; at once if it has left."""
        try:
            peer = await self._peer(sender)
        except PermissionDenied:
            callback()
        else:
            peer.on_gone.append(callback)

    def never_mind(self, sender: str, callback: Callable[[], None]) -> None:
        """No call back any more."""
        peer = self._known.get(sender)
        if peer is not None and callback in peer.on_gone:
            peer.on_gone.remove(callback)

    def close(self) -> None:
        for peer in self._known.values():
            peer.close()
        self._known.clear()

    async def _peer(self, sender: str) -> Peer:
        while (asked := self._asked.get(sender)) is not None:      # several calls of one sender at once: one question
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

        # before the question: who leaves after the answer is noticed
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
            with contextlib.suppress(OSError):      # dead already; then it stays unknown
                peer.pidfd = pidfd_open(peer.pid)
            again = await self._credentials(Peer(peer.sender))
            if (again.get('ProcessID'), again.get('UnixUserID')) != (peer.pid, peer.uid):
                raise PermissionDenied(f'the caller {peer.sender} changed while it was asked about')

    async def _credentials(self, peer: Peer) -> dict[str, Any]:
        """The answer of the bus. ProcessFD, where the bus has it, is the pidfd that nothing can get wrong."""
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
                # a mistake of ours: what others wait for still happens
                log.exception('%s has left, and not everything that follows was done', peer.sender)

    def _make_room(self, newcomer: int) -> None:
        """Keep the table small: whoever has the most connections loses the oldest, and hears of nothing any more until
        it calls again. One that somebody waits for is kept in any case."""
        counts = Counter(peer.uid for peer in self._known.values())
        if (newcomer and counts[newcomer] >= MAX_OF_USER) or len(self._known) >= MAX_PEERS:
            uid = newcomer if newcomer and counts[newcomer] >= MAX_OF_USER else counts.most_common(1)[0][0]
            peer = next((peer for peer in self._known.values() if peer.uid == uid and not peer.on_gone), None)
            if peer is not None:
                log.warning('uid %d has many connections: %s is told of nothing until it calls again', uid, peer.sender)
                del self._known[peer.sender]
                peer.close()
