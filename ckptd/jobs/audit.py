# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who was allowed what, and who was not: lines of the log that are always written (ckptd.logs)."""

import json
import logging
import re
import time
from dataclasses import dataclass
from typing import Final, Literal

log = logging.getLogger('ckptd.audit')

PLAIN = re.compile(r'[A-Za-z0-9._:-]+')
LONGEST: Final = 256        # characters of a value: a path on the bus may have as many as its caller likes
MOST: Final = 100           # lines of one user a second; a log that is full has none of the others


@dataclass(slots=True)
class _Second:
    """Of one user: when it began, lines that were written, decisions that were not."""
    began: float
    lines: int = 0
    left_out: int = 0


_seconds: dict[int, _Second] = {}


def audit(decision: Literal['allowed', 'refused'], rule: str, **fields: str | int) -> None:
    """One line, 'refused operation=freeze uid=1000 what="pid:7" rule=ptrace', whatever is in the names of things: what
    is not a plain word is quoted as JSON does it. Of a user (uid) with very many the rest of a second are counted."""
    uid = int(fields['uid'])
    second = _second_of(uid)
    if uid and second.lines >= MOST:
        second.left_out += 1
        return
    second.lines += 1
    shown = ' '.join(f'{name}={_word(value)}' for name, value in {**fields, 'rule': rule}.items())
    log.info('%s %s', decision, shown)


def _second_of(uid: int) -> _Second:
    now = time.monotonic()
    second = _seconds.get(uid)
    if second is None or now - second.began >= 1.0:
        if second is not None and second.left_out:
            log.info('more uid=%d decisions=%d', uid, second.left_out)
        for other in [other for other, one in _seconds.items() if now - one.began >= 60.0 and not one.left_out]:
            del _seconds[other]
        second = _seconds[uid] = _Second(now)
    return second


def _word(value: str | int) -> str:
    text = str(value)
    if len(text) > LONGEST:
        text = text[:LONGEST] + '...'
    return text if PLAIN.fullmatch(text) else json.dumps(text)
