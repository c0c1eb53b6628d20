# SPDX-License-Identifier: LGPL-2.1-or-later
"""The a{sv} options of methods: which there are, of what type, and what is said of any other."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ckptd.engine.messages import After, FreezeMode
from ckptd.errors import InvalidArgument

MAX_TIMEOUT = 3600 * 1_000_000      # microseconds


@dataclass(frozen=True, slots=True)
class Option:
    """One option by its name. `wanted` says what a value must be, in words that follow 'must be'."""
    name: str
    wanted: str
    accepts: Callable[[Any], bool]


def _choice(name: str, choices: tuple[str, ...]) -> Option:
    return Option(name, f'one of {", ".join(choices)}', lambda value: isinstance(value, str) and value in choices)


def _is_timeout(value: Any) -> bool:
    # any integer type will do: nobody should have to know that busctl wants a "t" here
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_TIMEOUT


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r'[A-Za-z0-9_]{1,64}', value, re.ASCII) is not None


FREEZE = _choice('freeze', get_args(FreezeMode))
AFTER = _choice('after', get_args(After))
TIMEOUT = Option('timeout', f'a number of microseconds from 1 to {MAX_TIMEOUT}', _is_timeout)
HANDLE_TOKEN = Option('handle_token', '1 to 64 characters of A-Z a-z 0-9 _', _is_token)

CHECKPOINT = (FREEZE, AFTER, TIMEOUT, HANDLE_TOKEN)
SELF = tuple(option for option in CHECKPOINT if option is not HANDLE_TOKEN)     # who waits needs no name of the job
CHECK = (FREEZE,)
FREEZING = (FREEZE, TIMEOUT)
NONE: tuple[Option, ...] = ()


def parse_options(given: Mapping[str, Any], known: tuple[Option, ...]) -> dict[str, Any]:
    """The options as they came, each known and of a value that it can have. InvalidArgument."""
    by_name = {option.name: option for option in known}
    for name, value in given.items():
        option = by_name.get(name)
        if option is None:
            raise InvalidArgument(f'there is no option "{name[:64]}"', resource=name[:64],
                                  hint=f'options here: {", ".join(by_name) or "none"}')
        if not option.accepts(value):
            raise InvalidArgument(f'option "{name}" must be {option.wanted}', resource=name)
    return dict(given)
