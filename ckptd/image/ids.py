# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image ids: `20240131_235959_sleep_3fa9`: UTC time, command, four random hexadecimal digits.

Only [a-z0-9_], so an id is a directory name and an element of an object path as it is, and ids sort by time.
"""

import re
import secrets
import time

MAX_NAME = 15       # as long as a comm can be

_ID = re.compile(r'[0-9]{8}_[0-9]{6}_[a-z0-9_]{1,15}_[0-9a-f]{4}', re.ASCII)


def new_image_id(command: str, when: float | None = None) -> str:
    """A fresh id for a tree whose root is called `command`; when: seconds since the epoch, now if None."""
    stamp = time.strftime('%Y%m%d_%H%M%S', time.gmtime(when))
    name = re.sub(r'[^a-z0-9]+', '_', command.lower()).strip('_')[:MAX_NAME].strip('_')
    return f'{stamp}_{name or "tree"}_{secrets.token_hex(2)}'


def other_image_id(image: str) -> str:
    """The same time and command with four other digits, for an image whose id is taken, or that may be."""
    while (digits := secrets.token_hex(2)) == image[-4:]:
        continue
    return image[:-4] + digits


def is_image_id(text: str) -> bool:
    """Whether `text` can be an id at all; what is not must never become part of a path."""
    return _ID.fullmatch(text) is not None
