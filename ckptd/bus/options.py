# SPDX-License-Identifier: LGPL-2.1-or-later
"""The a{sv} options of methods: names, types, and errors for all others."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ckptd.bus.message import UnixFd
from ckptd.errors import InvalidArgument
from ckptd.external import MAX_INHERITED, MAX_POLICIES, is_policy, is_what
from ckptd.kernel.statx import is_socket_or_pipe, is_terminal
from ckptd.protocol.requests import After, ChangedFiles, FreezeMode
from ckptd.sysv import MAX_NAMES, is_name
from ckptd.target import MAX_PATH, WORDS, CgroupTarget, clean_path, is_valid

MAX_TIMEOUT = 3600 * 1_000_000      # microseconds
MAX_SIZE = 2**63 - 1                # bytes
DETACHED = 'detach'                 # the option terminal, for a tree that gets none


@dataclass(frozen=True, slots=True)
class Option:
    """A named option. `wanted` completes the sentence "the option must be ..."."""
    name: str
    wanted: str
    accepts: Callable[[Any], bool]


def _choice(name: str, choices: tuple[str, ...]) -> Option:
    return Option(name, f'one of {", ".join(choices)}', lambda value: isinstance(value, str) and value in choices)


def _number(name: str, unit: str, most: int) -> Option:
    # Accept any integer type, so that users of busctl need not know that "t" is expected. A bool and a UnixFd are ints,
    # too.
    return Option(name, f'a number of {unit} from 1 to {most}', lambda value: type(value) is int and 0 < value <= most)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r'[A-Za-z0-9_]{1,64}', value, re.ASCII) is not None


def _is_cgroup(value: Any) -> bool:
    # the kernel's bound for the path is for all of it, with its double slashes
    return isinstance(value, str) and len(value) < MAX_PATH and is_valid(CgroupTarget(clean_path(value)))


def _is_terminal(value: Any) -> bool:
    # a plain int could be any fd of the daemon
    return value == DETACHED if isinstance(value, str) else isinstance(value, UnixFd) and is_terminal(value)


def _is_external(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= MAX_POLICIES and all(map(is_policy, value))


def _is_sysv(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= MAX_NAMES and all(map(is_name, value))


def _is_inherited(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= MAX_INHERITED and all(map(_is_given, value))


def _is_given(value: Any) -> bool:
    match value:
        case [str(what), UnixFd() as fd]:
            return is_what(what) and is_socket_or_pipe(fd)
    return False


def _flag(name: str) -> Option:
    return Option(name, 'true or false', lambda value: isinstance(value, bool))


FREEZE = _choice('freeze', get_args(FreezeMode))
AFTER = _choice('after', get_args(After))
TIMEOUT = _number('timeout', 'microseconds', MAX_TIMEOUT)
HANDLE_TOKEN = Option('handle_token', '1 to 64 characters of A-Z a-z 0-9 _', _is_token)
SAVE_FILES = _flag('save_files')
SAVE_LIMIT = _number('save_limit', 'bytes', MAX_SIZE)
EXTERNAL = Option('external', f'up to {MAX_POLICIES} texts WHAT:ACTION', _is_external)
SYSV = Option('sysv', f'up to {MAX_NAMES} texts ID, sem:ID or msg:ID', _is_sysv)
CGROUP = Option('cgroup', 'an absolute path of a cgroup, without ".."', _is_cgroup)
CHANGED_FILES = _choice('changed_files', get_args(ChangedFiles))
INHERIT = Option('inherit', f'up to {MAX_INHERITED} pairs (WHAT, file descriptor of a socket or pipe)', _is_inherited)
TERMINAL = Option('terminal', f'a file descriptor of a terminal, or "{DETACHED}"', _is_terminal)

AS_ROOT, DETACH = _flag('as_root'), _flag('detach')
TARGET = Option('target', f'the text of a target; {WORDS}', lambda value: isinstance(value, str))

SELF = (FREEZE, AFTER, _flag('force'), TIMEOUT, SAVE_FILES, SAVE_LIMIT, EXTERNAL, SYSV)
# a caller of CheckpointSelf waits, so it needs neither a name for the job nor detach
CHECKPOINT = (*SELF, AS_ROOT, DETACH, HANDLE_TOKEN)
CHECK_RESTORE = (CGROUP, _flag('new_pidns'), _flag('clamp'), _flag('force'), _flag('leave_stopped'), CHANGED_FILES,
                 _flag('wait'), INHERIT, TERMINAL)
RESTORE = (*CHECK_RESTORE, DETACH, HANDLE_TOKEN)
INHIBIT = (TARGET,)
CHECK = (FREEZE, EXTERNAL, SYSV, AS_ROOT)
FREEZING = (FREEZE, TIMEOUT, DETACH)
NONE: tuple[Option, ...] = ()


def parse_options(given: Mapping[str, Any], known: tuple[Option, ...]) -> dict[str, Any]:
    """Check the options: each must be known and have a valid value. InvalidArgument."""
    by_name = {option.name: option for option in known}
    for name, value in given.items():
        option = by_name.get(name)
        if option is None:
            raise InvalidArgument(f'unknown option "{name[:64]}"', resource=name[:64],
                                  hint=f'options here: {", ".join(by_name) or "none"}')
        if not option.accepts(value):
            raise InvalidArgument(f'option "{name}" must be {option.wanted}', resource=name)
    return dict(given)
