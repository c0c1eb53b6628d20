# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that have arrived and are not served yet.

    header    refused if there are too many: by a count, before the body is read, with a prepared answer
    message   waits in the queue of its user
    begun     a few in each turn of the loop, one user after the other

So the socket of the bus is emptied as fast as clients fill it, and a user's single call waits for one call of each
other user. The bus has to be asked for the uid of a connection, which happens with its first call. Until then its calls
wait in a queue of their own, and every other turn goes to these queues.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

from ckptd.bus.turns import Key, Turns
from ckptd.bus.wire import MAX_BODY, Received
from ckptd.errors import LimitsExceeded

MAX_CALLS: Final = 32               # in flight, from one sender
MAX_CALLS_OF_USER: Final = 256      # from all connections of one uid; root has no limit
MAX_CALLS_OF_UNKNOWN: Final = 1024  # from connections whose uid is not known yet
MAX_CALLS_IN_ALL: Final = 2048
MAX_WAITING: Final = MAX_CALLS * MAX_BODY       # bytes of arguments in one queue
MAX_FDS: Final = 16                 # with one call
MAX_UIDS: Final = 4096              # connections whose uid is remembered
BEGUN_IN_A_TURN: Final = 2
# A user with calls refused in the last NOISY seconds has one call begun every PACE seconds. Reading and refusing such
# calls takes more time than all else that the loop does, and other users' messages wait behind them.
NOISY: Final = 0.25
PACE: Final = 0.02
_HINT: Final = 'wait for replies'


class Intake:
    """Queues of calls. begin: serves a call, which counts until it is `finished`. refuse: answers a call that was put
    but exceeds a limit."""

    def __init__(self, begin: Callable[[Received], None], refuse: Callable[[Received, LimitsExceeded], None]) -> None:
        self._begin, self._refuse = begin, refuse
        self._known, self._unknown = Turns[Received](), Turns[Received]()
        self._asked: set[str] = set()       # connections whose first call is asking for their uid
        self._uids: dict[str, int] = {}     # a bus gives no unique name twice, and a connection keeps its uid
        self._of_sender: Counter[str] = Counter()
        self._of_user: Counter[int] = Counter()
        self._users: dict[Received, int] = {}       # the user in whose count a call is
        self._quiet_from: dict[Key, float] = {}     # of users that had calls refused
        self._next_begin: dict[Key, float] = {}     # of the same users
        self._loop = asyncio.get_running_loop()
        self._next_turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None      # for queues that have no turn until then
        self._turn_of_unknown = False
        self.count = 0      # calls that wait or are served

    def refusal(self, header: Received) -> LimitsExceeded | None:
        """Return why a call is not taken in, whatever its sender and purpose; None if it is."""
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
        """Take a call in. It begins when its turn comes."""
        key, queues = self._place(message.sender)
        self._of_sender[message.sender] += 1
        self.count += 1
        if isinstance(key, int):
            self._enter(message, key)
        # A queue that waits while no turn is scheduled has no turn now.
        if self._next_turn is None and key not in queues and self._may_begin(key):
            self._start(message)
        else:
            queues.put(key, message, message.length)
        self._schedule()

    def belongs_to(self, message: Received, uid: int) -> None:
        """Count a call, whose user was unknown when it came, as one of its user. LimitsExceeded."""
        full = message not in self._users and self._is_full(uid)
        if message not in self._users and not full:
            self._enter(message, uid)
        if message.sender not in self._uids:
            self._know(message.sender, uid)
        if full:
            raise LimitsExceeded(_of_user(uid), hint=_HINT)

    def _know(self, sender: str, uid: int) -> None:
        """Note the uid of a sender. Its calls now wait with those of its user."""
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
        if message.sender in self._asked:       # the uid was not found out
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
        """Begin no more calls. Yield each waiting call once."""
        for handle in (self._next_turn, self._timer):
            if handle is not None:
                handle.cancel()
        while (message := self._known.take() or self._unknown.take()) is not None:
            self.finished(message)
            yield message

    def key_of(self, destination: str) -> Key:
        """Return the queue in which an answer for a destination waits; '' if it is not a connection."""
        return self._uids.get(destination, destination if destination.startswith(':') else '')

    def _place(self, sender: str) -> tuple[Key, Turns[Received]]:
        """Return where the calls of a sender wait: behind its earlier ones."""
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
        """Whether a call of this queue may begin now. Its turn is used if so."""
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
    """Make the error for excess calls. It is shared, so it must not be raised."""
    return LimitsExceeded(words, hint=_HINT)


def _of_user(uid: int) -> str:
    return f'more than {MAX_CALLS_OF_USER} calls of uid {uid} at a time'


def require_limits(message: Received) -> None:
    """Check a call against the limits for a single call. LimitsExceeded."""
    if message.raw is None or message.fds.count > MAX_FDS:
        raise LimitsExceeded(f'a call may have {MAX_BODY} bytes of arguments and {MAX_FDS} file descriptors')
    if message.fds.count != message.fd_count:
        # The kernel drops fds that do not fit under RLIMIT_NOFILE (recvmsg(2), MSG_CTRUNC), and stream.py drops those
        # it does not take in.
        raise LimitsExceeded(f'{message.fds.count} file descriptors came instead of {message.fd_count}',
                             hint='try again later')
