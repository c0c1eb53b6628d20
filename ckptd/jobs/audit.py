# SPDX-License-Identifier: LGPL-2.1-or-later
"""The audit log: which calls were allowed and which refused. These lines are always written (ckptd.logs).

A full log would lose other lines. So each user except root may have MOST lines a second of each kind, and the lines
left out are counted. A kind is a method (or the operation of a job) together with "allowed" or "refused". So many
harmless calls cause no other kind of line to be left out.
"""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

log = logging.getLogger('ckptd.audit')

Decision = Literal['allowed', 'refused']

PLAIN = re.compile(r'[A-Za-z0-9._:-]+')
LONGEST: Final = 256        # characters of a value: a path on the bus can be as long as its caller likes
MOST: Final = 20            # lines of one kind, of one user, in a second
# These refusals come before the method is looked up. A caller can make up any number of method names, so all are one
# kind.
BY_RULE: Final = frozenset({'limits', 'not theirs to see'})


class _Kind(NamedTuple):
    decision: Decision
    name: str           # 'rule', 'method' or 'operation'
    value: str


@dataclass(slots=True)
class _Second:
    """The decisions of one user in one second, with a timer that logs at its end how many were left out."""
    uid: int
    began: float
    decisions: Counter[_Kind] = field(default_factory=Counter)
    timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        """Log how many decisions were left out."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        for kind, count in self.decisions.items():
            if count > MOST:
                log.info('more %s uid=%d %s=%s decisions=%d', kind.decision, self.uid, kind.name, _word(kind.value),
                         count - MOST)
        self.decisions.clear()


_seconds: dict[int, _Second] = {}


def audit(decision: Decision, rule: str, **fields: str | int) -> None:
    """Log one line: 'refused operation=freeze uid=1000 what="pid:7" rule=ptrace'. Values other than plain words are
    quoted as in JSON.

    A line beyond the limit is counted in a line at the end of its second: 'more refused uid=1000 method=Freeze
    decisions=12'. Needs a running loop.
    """
    uid = int(fields['uid'])
    if uid and _too_many(uid, _kind_of(decision, rule, fields)):
        return
    shown = ' '.join(f'{name}={_word(value)}' for name, value in {**fields, 'rule': rule}.items())
    log.info('%s %s', decision, shown)


def flush() -> None:
    """Log now how many decisions were left out."""
    for second in _seconds.values():
        second.end()
    _seconds.clear()


def _kind_of(decision: Decision, rule: str, fields: dict[str, str | int]) -> _Kind:
    name = next((name for name in ('method', 'operation') if name in fields), 'rule')
    if name == 'rule' or rule in BY_RULE:
        return _Kind(decision, 'rule', rule)
    return _Kind(decision, name, str(fields[name]))


def _too_many(uid: int, kind: _Kind) -> bool:
    second = _second_of(uid)
    second.decisions[kind] += 1
    if second.decisions[kind] <= MOST:
        return False
    if second.timer is None:
        second.timer = asyncio.get_running_loop().call_later(second.began + 1.0 - time.monotonic(), second.end)
    return True


def _second_of(uid: int) -> _Second:
    now = time.monotonic()
    second = _seconds.get(uid)
    if second is None or now - second.began >= 1.0:
        for other in [one for one in _seconds.values() if now - one.began >= 1.0]:
            other.end()
            del _seconds[other.uid]
        second = _seconds[uid] = _Second(uid, now)
    return second


def _word(value: str | int) -> str:
    text = str(value)
    if len(text) > LONGEST:
        text = text[:LONGEST] + '...'
    return text if PLAIN.fullmatch(text) else json.dumps(text)
