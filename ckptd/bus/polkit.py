# SPDX-License-Identifier: LGPL-2.1-or-later
"""polkit: what an administrator has decided, or is asked to (org.freedesktop.PolicyKit1.Authority).

The answers of any process that has the name would count, so its owner must be root or the user polkitd: where polkit is
not installed a bus may let anybody have the name.

A bus lets a connection wait for some number of replies at a time (dbus-daemon(1): max_replies_per_connection, 128), and
refuses every call beyond. So questions have places, in turn between users:

    quick       what polkit answers by itself, in milliseconds: every question is first one of these
    of persons  somebody is asked, which takes minutes: those only that need it
"""

import asyncio
import contextlib
import itertools
import logging
import os
import pwd
from collections.abc import AsyncIterator, Callable, Mapping
from enum import Enum
from typing import Final

from ckptd.bus import wire
from ckptd.bus.connection import ERROR, Connection, Match, Subscription
from ckptd.bus.message import NO_REPLY_EXPECTED, DBusError
from ckptd.errors import LimitsExceeded
from ckptd.jobs.slots import Slots

log = logging.getLogger(__name__)

NAME: Final = 'org.freedesktop.PolicyKit1'
PATH: Final = '/org/freedesktop/PolicyKit1/Authority'
AUTHORITY: Final = 'org.freedesktop.PolicyKit1.Authority'
ALLOW_INTERACTION: Final = 1
USER: Final = 'polkitd'             # what polkitd runs as
TIMEOUT: Final = 25.0               # seconds for an answer that needs nobody
SHORT: Final = 3.0                  # and for one that something else waits for, which can do without
PATIENCE: Final = 300.0             # seconds for a person
QUICK: Final = 32, 4                # places in all, and of one user
OF_PERSONS: Final = 32, 2
# there is none, and none is installed; one that does not start, leaves or does not answer is another matter
_ABSENT: Final = frozenset(f'{ERROR}{name}' for name in ('ServiceUnknown', 'Spawn.ServiceNotFound'))


class PolkitAnswer(Enum):
    YES = 'yes'
    NO = 'no'
    ASK = 'ask'             # a person would have to be asked, and the caller does not wait for that
    DISMISSED = 'dismissed'     # a person was asked, and wanted none of it
    ABSENT = 'absent'       # no polkit, or it does not know the action
    SILENT = 'silent'       # it does not answer, or with an error: who cannot tell does not let in


class Polkit:
    """The authority on a connection's bus, if it has one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._trusted: str | None = None        # unique name of an owner that was looked at
        self._watch: Subscription | None = None
        self._numbers = itertools.count(1)
        self._quick, self._of_persons = Slots(*QUICK), Slots(*OF_PERSONS)
        self.on_changed: Callable[[], None] = lambda: None      # what was answered may be another answer now

    async def ask(self, sender: str, uid: int, action: str, details: Mapping[str, str], *, interactive: bool = False,
                  patience: float = TIMEOUT) -> PolkitAnswer:
        """May the sender, who has this uid, do this? interactive: it waits until somebody was asked, if need be.
        patience: seconds, where nobody is; as many for the turn.

        LimitsExceeded when its turn does not come, or the bus carries no more questions.
        """
        async with self._turn(self._quick, uid, patience):
            answer = await self._ask(sender, action, details, 0, patience)
        if answer != PolkitAnswer.ASK or not interactive:
            return answer
        async with self._turn(self._of_persons, uid, PATIENCE):
            return await self._ask(sender, action, details, ALLOW_INTERACTION, PATIENCE)

    @staticmethod
    @contextlib.asynccontextmanager
    async def _turn(slots: Slots, uid: int, patience: float) -> AsyncIterator[None]:
        """A place in the lane, once it is the user's turn. LimitsExceeded."""
        try:
            async with asyncio.timeout(patience):
                await slots.acquire(uid)
        except TimeoutError:
            raise _too_many(f'uid {uid} waits for polkit to answer others') from None
        try:
            yield
        finally:
            slots.release(uid)

    async def _ask(self, sender: str, action: str, details: Mapping[str, str], flags: int,
                   patience: float) -> PolkitAnswer:
        try:
            if not await self._is_there():
                return PolkitAnswer.ABSENT
        except DBusError as error:
            return PolkitAnswer.ABSENT if error.name in _ABSENT else _silent(action, error)
        try:
            return await self._check(sender, action, details, flags, patience)
        except DBusError as error:
            if 'is not registered' in error.message:
                log.warning('polkit does not know %s: install org.ckptd1.policy', action)
                return PolkitAnswer.ABSENT
            # also where it has left meanwhile: that it restarts does not mean that it is not there
            return _silent(action, error)

    async def _is_there(self) -> bool:
        """Whether an owner that may be believed has the name; started by the bus if it can be."""
        [there] = await self._connection.driver('NameHasOwner', 's', NAME)
        if not there:
            await self._connection.driver('StartServiceByName', 'su', NAME, 0)
        [owner] = await self._connection.driver('GetNameOwner', 's', NAME)
        if owner != self._trusted:
            [uid] = await self._connection.driver('GetConnectionUnixUser', 's', owner)
            if uid not in _believed():
                log.warning('%s is owned by uid %d, and not believed', NAME, uid)
                return False
            await self._follow(owner)
        return True

    async def _follow(self, owner: str) -> None:
        """Hear when its answers change: rules, sessions, what was granted for a while."""
        watch = await self._connection.subscribe(Match(owner, AUTHORITY, 'Changed', PATH), lambda _: self.on_changed())
        if self._watch is not None:
            self._watch.cancel()
        another, self._trusted, self._watch = self._trusted is not None, owner, watch
        if another:
            self.on_changed()       # it may answer otherwise

    async def _check(self, sender: str, action: str, details: Mapping[str, str], flags: int,
                     patience: float) -> PolkitAnswer:
        cancellation = f'ckptd-{os.getpid()}-{next(self._numbers)}'
        try:
            [[allowed, challenge, said]] = await self._connection.call(
                self._trusted or NAME, PATH, AUTHORITY, 'CheckAuthorization', '(sa{sv})sa{ss}us',
                [('system-bus-name', {'name': sender}), action, dict(details), flags, cancellation], timeout=patience)
        except (asyncio.CancelledError, DBusError):
            # the caller has left, or it took too long: nobody needs to be asked any more
            self._connection.send(wire.make_call(NAME, PATH, AUTHORITY, 'CancelCheckAuthorization', 's', [cancellation],
                                                 NO_REPLY_EXPECTED))
            raise
        if allowed:
            return PolkitAnswer.YES
        if 'polkit.dismissed' in said:
            return PolkitAnswer.DISMISSED
        return PolkitAnswer.ASK if challenge else PolkitAnswer.NO


def _silent(action: str, error: DBusError) -> PolkitAnswer:
    if error.name == f'{ERROR}LimitsExceeded':      # says nothing of who may do what
        raise _too_many(f'the bus carries no more questions: {error.message}') from error
    log.error('polkit does not answer about %s: %s', action, error.message)
    return PolkitAnswer.SILENT


def _too_many(why: str) -> LimitsExceeded:
    return LimitsExceeded(f'too many questions to polkit at a time: {why}', resource='polkit',
                          hint='answer those that wait, then try again')


def _believed() -> set[int]:
    uids = {0}
    with contextlib.suppress(KeyError):
        uids.add(pwd.getpwnam(USER).pw_uid)
    return uids
