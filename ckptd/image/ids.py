# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image ids, such as `20240131_235959_sleep_3fa9`: UTC time, command, four random hexadecimal digits.

They use only [a-z0-9_], so an id is a valid directory name and element of an object path, and ids sort by time.
"""

import re
import secrets
import time

MAX_NAME = 15       # the length of a comm

_ID = re.compile(r'[0-9]{8}_[0-9]{6}_[a-z0-9_]{1,15}_[0-9a-f]{4}', re.ASCII)


def new_image_id(command: str, when: float | None = None) -> str:
    """Make an id for a tree whose root is called `command`. when: seconds since the epoch, now if None."""
    stamp = time.strftime('%Y%m%d_%H%M%S', time.gmtime(when))
    name = re.sub(r'[^a-z0-9]+', '_', command.lower()).strip('_')[:MAX_NAME].strip('_')
    return f'{stamp}_{name or "tree"}_{secrets.token_hex(2)}'


def other_image_id(image: str) -> str:
    """Return an id with the same time and command and other digits, for an image whose id is, or may be, in use."""
    while (digits := secrets.token_hex(2)) == image[-4:]:
        continue
    return image[:-4] + digits


def is_image_id(text: str) -> bool:
    """Whether `text` is a valid id. Any other text must never become part of a path."""
    return _ID.fullmatch(text) is not None
