# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that have come and are not served yet.

    header    refused where there are too many: by a count, before the body is read, and with an answer that is ready
    message   waits in the queue of its user
    begun     a few in each turn of the loop, one user after the other

So the socket of the bus is emptied as fast as anybody fills it, and a user who calls once waits for one call of each
other user. Whose a connection is has to be asked of the bus, which is done with its first call: until then its calls
wait in a queue of its own, and such queues together have every other place.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

from ckptd.bus.turns import Key, Turns
from ckptd.bus.wire import MAX_BODY, Received
from ckptd.errors import LimitsExceeded

MAX_CALLS: Final = 32               # in flight, of one sender
MAX_CALLS_OF_USER: Final = 256      # of all connections of one uid; root has no limit
MAX_CALLS_OF_UNKNOWN: Final = 1024  # of connections that have not been asked about
MAX_CALLS_IN_ALL: Final = 2048
MAX_WAITING: Final = MAX_CALLS * MAX_BODY       # bytes of arguments in one queue
MAX_FDS: Final = 16                 # with one call
MAX_UIDS: Final = 4096              # connections whose uid is remembered
BEGUN_IN_A_TURN: Final = 2
# whoever has had calls refused in the last NOISY seconds has one begun every PACE seconds: what is read and refused
# meanwhile is more than what else the loop does, and behind it is what others have sent
NOISY: Final = 0.25
PACE: Final = 0.02
_HINT: Final = 'wait for replies'


class Intake:
    """begin: serves a call, which counts until it is `finished`. refuse: answers one that was put, and is too much."""

    def __init__(self, begin: Callable[[Received], None], refuse: Callable[[Received, LimitsExceeded], None]) -> None:
        self._begin, self._refuse = begin, refuse
        self._known, self._unknown = Turns[Received](), Turns[Received]()
        self._asked: set[str] = set()       # connections by whose first call we get to know the uid
        self._uids: dict[str, int] = {}     # a bus gives no unique name twice, and a connection keeps its uid
        self._of_sender: Counter[str] = Counter()
        self._of_user: Counter[int] = Counter()
        self._users: dict[Received, int] = {}       # whose count a call is in
        self._quiet_from: dict[Key, float] = {}     # of those that have had calls refused
        self._next_begin: dict[Key, float] = {}     # of the same
        self._loop = asyncio.get_running_loop()
        self._next_turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None      # for queues that have no turn until then
        self._turn_of_unknown = False
        self.count = 0      # calls that wait or are served

    def refusal(self, header: Received) -> LimitsExceeded | None:
        """Why a call is not taken in, whoever calls and for what."""
        key, queues = self._place(header.sender)
        error = self._excess(header, key, queues)
        if error is not None:
            if key not in self._quiet_from:
                self._next_begin[key] = 0.0
            self._quiet_from[key] = self._loop.time() + NOISY
        return error

    def _excess(self, header: Received, key: Key, queues: Turns[Received]) -> LimitsExceeded | None:
        if self._of_sender[header.sender] >= MAX_CALLS:
            return _too_many(f'more than {MAX_CALLS} calls at a time')
        if isinstance(key, int) and self._is_full(key):
            return _too_many(_of_user(key))
        if self.count >= MAX_CALLS_IN_ALL:
            return _too_many(f'ckptd has {MAX_CALLS_IN_ALL} calls to answer')
        if queues is self._unknown and queues.count >= MAX_CALLS_OF_UNKNOWN:
            return _too_many(f'ckptd has {MAX_CALLS_OF_UNKNOWN} calls of new connections to answer')
        if queues.size_of(key) + header.length > MAX_WAITING:
            return _too_many(f'calls with {MAX_WAITING >> 20} MiB of arguments wait')
        return None

    def put(self, message: Received) -> None:
        """Take a call in: it is begun when it is its turn."""
        key, queues = self._place(message.sender)
        self._of_sender[message.sender] += 1
        self.count += 1
        if isinstance(key, int):
            self._enter(message, key)
        # whoever waits where no turn is about to come has none now
        if self._next_turn is None and key not in queues and self._may_begin(key):
            self._start(message)
        else:
            queues.put(key, message, message.length)
        self._schedule()

    def belongs_to(self, message: Received, uid: int) -> None:
        """Count a call, whose user was not known when it came, among those of its user. LimitsExceeded."""
        full = message not in self._users and self._is_full(uid)
        if message not in self._users and not full:
            self._enter(message, uid)
        if message.sender not in self._uids:
            self._know(message.sender, uid)
        if full:
            raise LimitsExceeded(_of_user(uid), hint=_HINT)

    def _know(self, sender: str, uid: int) -> None:
        """The uid of a sender is known: its calls wait among those of its user."""
        self._uids[sender] = uid
        if len(self._uids) > MAX_UIDS:
            del self._uids[next(iter(self._uids))]
        for message in self._unknown.take_all(sender):
            if self._is_full(uid):
                self.finished(message)
                self._refuse(message, _too_many(_of_user(uid)))
            else:
                self._enter(message, uid)
                self._known.put(uid, message, message.length)
        self._asked.discard(sender)
        self._schedule()

    def finished(self, message: Received) -> None:
        self.count -= 1
        if message.sender in self._asked:       # and nothing came of it
            self._asked.discard(message.sender)
            self._schedule()
        self._of_sender[message.sender] -= 1
        if not self._of_sender[message.sender]:
            del self._of_sender[message.sender]
        if (uid := self._users.pop(message, None)) is not None:
            self._of_user[uid] -= 1
            if not self._of_user[uid]:
                del self._of_user[uid]

    def has(self, sender: str) -> bool:
        """Whether calls of this sender wait or are served."""
        return sender in self._of_sender

    def clear(self) -> Iterator[Received]:
        """Begin no more; what waits, once."""
        for handle in (self._next_turn, self._timer):
            if handle is not None:
                handle.cancel()
        while (message := self._known.take() or self._unknown.take()) is not None:
            self.finished(message)
            yield message

    def key_of(self, destination: str) -> Key:
        """In whose queue an answer waits; '' for what is no connection's."""
        return self._uids.get(destination, destination if destination.startswith(':') else '')

    def _place(self, sender: str) -> tuple[Key, Turns[Received]]:
        """Where calls of a sender wait: behind its earlier ones."""
        uid = self._uids.get(sender)
        if uid is None or sender in self._unknown:
            return sender, self._unknown
        return uid, self._known

    def _is_full(self, uid: int) -> bool:
        return bool(uid) and self._of_user[uid] >= MAX_CALLS_OF_USER

    def _enter(self, message: Received, uid: int) -> None:
        self._users[message] = uid
        self._of_user[uid] += 1

    # ------------------------------------------------------------ turns

    def _schedule(self) -> None:
        if self._next_turn is None:
            self._next_turn = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._next_turn = None
        self._forget_quiet()
        for _ in range(BEGUN_IN_A_TURN):
            if (message := self._take()) is None:
                if self._timer is None and self._quiet_from and (self._known.count or self._unknown.count):
                    self._timer = self._loop.call_later(PACE, self._look_again)
                return
            self._start(message)
        self._schedule()

    def _start(self, message: Received) -> None:
        if message.sender not in self._uids:
            self._asked.add(message.sender)
        self._begin(message)

    def _look_again(self) -> None:
        self._timer = None
        self._schedule()

    def _forget_quiet(self) -> None:
        now = self._loop.time()
        for key in [key for key, quiet in self._quiet_from.items() if quiet <= now]:
            del self._quiet_from[key]
            self._next_begin.pop(key, None)

    def _take(self) -> Received | None:
        self._turn_of_unknown = not self._turn_of_unknown
        first, second = (self._unknown, self._known) if self._turn_of_unknown else (self._known, self._unknown)
        return first.take(self._may_begin) or second.take(self._may_begin)

    def _may_begin(self, key: Key) -> bool:
        """Asked of a queue that has its turn if so."""
        if key in self._asked:
            return False
        if key in self._quiet_from:
            now = self._loop.time()
            if now < self._next_begin[key]:
                return False
            self._next_begin[key] = now + PACE
        return True


@lru_cache(64)
def _too_many(words: str) -> LimitsExceeded:
    """Not to be raised: one for all."""
    return LimitsExceeded(words, hint=_HINT)


def _of_user(uid: int) -> str:
    return f'more than {MAX_CALLS_OF_USER} calls of uid {uid} at a time'


def require_limits(message: Received) -> None:
    """LimitsExceeded for a call that is too much by itself."""
    if message.raw is None or message.fds.count > MAX_FDS:
        raise LimitsExceeded(f'a call may have {MAX_BODY} bytes of arguments and {MAX_FDS} file descriptors')
    if message.fds.count != message.fd_count:
        # the kernel drops what does not fit under RLIMIT_NOFILE (recvmsg(2), MSG_CTRUNC), or what stream.py does not
        # take in
        raise LimitsExceeded(f'{message.fds.count} file descriptors came instead of {message.fd_count}',
                             hint='try again later')
