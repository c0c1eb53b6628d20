# SPDX-License-Identifier: LGPL-2.1-or-later
"""polkit: decisions of an administrator (org.freedesktop.PolicyKit1.Authority).

Any process that owns the name could answer, so the owner must be root or the user polkitd. Where polkit is not
installed, a bus may let any client take the name.

A bus lets a connection wait for a limited number of replies at a time (dbus-daemon(1): max_replies_per_connection, 128)
and refuses every call beyond that. So questions wait for slots, which users get in turn:

    quick       polkit answers by itself, in milliseconds; every question is first asked this way
    of persons  a person is asked, which takes minutes; only for questions that need it
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
USER: Final = 'polkitd'             # the user that polkitd runs as
TIMEOUT: Final = 25.0               # seconds for an answer that needs no person
SHORT: Final = 3.0                  # seconds for an answer that something else waits for and can do without
PATIENCE: Final = 300.0             # seconds for a person to answer
QUICK: Final = 32, 4                # slots in all, and for one user
OF_PERSONS: Final = 32, 2
# polkit neither runs nor is installed. A polkit that does not start, leaves or does not answer is a different case.
_ABSENT: Final = frozenset(f'{ERROR}{name}' for name in ('ServiceUnknown', 'Spawn.ServiceNotFound'))


class PolkitAnswer(Enum):
    YES = 'yes'
    NO = 'no'
    ASK = 'ask'             # a person would have to be asked, and the caller does not wait for that
    DISMISSED = 'dismissed'     # a person was asked and dismissed the dialog
    ABSENT = 'absent'       # no polkit, or it does not know the action
    SILENT = 'silent'       # polkit does not answer or answers with an error; access is then denied


class Polkit:
    """The polkit authority on a connection's bus, if there is one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._trusted: str | None = None        # unique name of an owner whose uid was checked
        self._watch: Subscription | None = None
        self._numbers = itertools.count(1)
        self._quick, self._of_persons = Slots(*QUICK), Slots(*OF_PERSONS)
        self.on_changed: Callable[[], None] = lambda: None      # called when earlier answers may have changed

    async def ask(self, sender: str, uid: int, action: str, details: Mapping[str, str], *, interactive: bool = False,
                  patience: float = TIMEOUT) -> PolkitAnswer:
        """Ask whether the sender, who has this uid, may do this. interactive: wait for a person if need be. patience:
        seconds to wait for an answer without a person, and as long again for the turn.

        LimitsExceeded when the turn does not come, or the bus carries no more questions.
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
        """Hold a slot once it is the user's turn. LimitsExceeded."""
        try:
            async with asyncio.timeout(patience):
                await slots.acquire(uid)
        except TimeoutError:
            raise _too_many(f'uid {uid} waits while polkit answers others') from None
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
            # This covers a polkit that left meanwhile: while it restarts it does not count as absent.
            return _silent(action, error)

    async def _is_there(self) -> bool:
        """Whether a trusted process owns the name. The bus starts polkit if it can."""
        [there] = await self._connection.driver('NameHasOwner', 's', NAME)
        if not there:
            await self._connection.driver('StartServiceByName', 'su', NAME, 0)
        [owner] = await self._connection.driver('GetNameOwner', 's', NAME)
        if owner != self._trusted:
            [uid] = await self._connection.driver('GetConnectionUnixUser', 's', owner)
            if uid not in _believed():
                log.warning('%s is owned by uid %d, which is not trusted', NAME, uid)
                return False
            await self._follow(owner)
        return True

    async def _follow(self, owner: str) -> None:
        """Subscribe to changes of the answers: rules, sessions, temporary authorizations."""
        watch = await self._connection.subscribe(Match(owner, AUTHORITY, 'Changed', PATH), lambda _: self.on_changed())
        if self._watch is not None:
            self._watch.cancel()
        another, self._trusted, self._watch = self._trusted is not None, owner, watch
        if another:
            self.on_changed()       # the new owner may answer differently

    async def _check(self, sender: str, action: str, details: Mapping[str, str], flags: int,
                     patience: float) -> PolkitAnswer:
        cancellation = f'ckptd-{os.getpid()}-{next(self._numbers)}'
        try:
            [[allowed, challenge, said]] = await self._connection.call(
                self._trusted or NAME, PATH, AUTHORITY, 'CheckAuthorization', '(sa{sv})sa{ss}us',
                [('system-bus-name', {'name': sender}), action, dict(details), flags, cancellation], timeout=patience)
        except (asyncio.CancelledError, DBusError):
            # the caller has left, or it took too long: dismiss the dialog
            self._connection.send(wire.make_call(NAME, PATH, AUTHORITY, 'CancelCheckAuthorization', 's', [cancellation],
                                                 NO_REPLY_EXPECTED))
            raise
        if allowed:
            return PolkitAnswer.YES
        if 'polkit.dismissed' in said:
            return PolkitAnswer.DISMISSED
        return PolkitAnswer.ASK if challenge else PolkitAnswer.NO


def _silent(action: str, error: DBusError) -> PolkitAnswer:
    if error.name == f'{ERROR}LimitsExceeded':      # the bus's limit says nothing about rights
        raise _too_many(f'the bus carries no more questions: {error.message}') from error
    log.error('polkit does not answer about %s: %s', action, error.message)
    return PolkitAnswer.SILENT


def _too_many(why: str) -> LimitsExceeded:
    return LimitsExceeded(f'too many questions to polkit at a time: {why}', resource='polkit',
                          hint='answer the open dialogs, then try again')


def _believed() -> set[int]:
    uids = {0}
    with contextlib.suppress(KeyError):
        uids.add(pwd.getpwnam(USER).pw_uid)
    return uids
