# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who was allowed what, and who was not: lines of the log that are always written (ckptd.logs)."""

import json
import logging
import re
from typing import Literal

log = logging.getLogger('ckptd.audit')

PLAIN = re.compile(r'[A-Za-z0-9._:-]+')


def audit(decision: Literal['allowed', 'refused'], rule: str, **fields: str | int) -> None:
    """One line, 'refused operation=freeze uid=1000 what="pid:7" rule=ptrace', whatever is in the names of things: what
    is not a plain word is quoted as JSON does it."""
    shown = ' '.join(f'{name}={_word(value)}' for name, value in {**fields, 'rule': rule}.items())
    log.info('%s %s', decision, shown)


def _word(value: str | int) -> str:
    return str(value) if PLAIN.fullmatch(str(value)) else json.dumps(value)
