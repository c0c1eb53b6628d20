# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules for records of all kinds of open files that the grammar does not express."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, cast

from ckptd.image.grammar import Struct
from ckptd.image.records import PAGE, Extent, data_name
from ckptd.image.shapes import MAX_FILE
from ckptd.kernel.sockopt import BPF_MAXINSNS, SOCK_FILTER
from ckptd.kernel.tty import LOCKED_SIZE, TERMIOS_SIZE
from ckptd.objects.files.content import ContentSegment
from ckptd.objects.files.locks import EOF, LEASE, POSIX, TO_NONE, TO_READ, Lock
from ckptd.objects.files.other_names import is_link
from ckptd.objects.files.socket_filter import SocketFilter
from ckptd.objects.files.terminal.state import TerminalState

_MAX_CAPACITY = (1 << 31) - 1       # of a pipe: fs/pipe.c, round_pipe_size
_MAX_PTS = (1 << 20) - 1           # of a pseudo-terminal: drivers/tty/pty.c, NR_UNIX98_PTY_MAX
_MAX_WD = (1 << 31) - 1             # of an inotify instance: fs/notify/inotify/inotify_user.c, inotify_ioctl
_MAX_FD = (1 << 31) - 1
# the highest value of fields by name, in every kind with such a field
_HIGHEST = {'size': MAX_FILE, 'capacity': _MAX_CAPACITY, 'wd': _MAX_WD, 'pts': _MAX_PTS, 'fd': _MAX_FD}


def flaws(record: Struct, size_of: Callable[[str], int]) -> Iterator[str]:
    """Yield violations, one sentence each. size_of: size in bytes of a file of the image, 0 if there is none."""
    for field in fields(cast(Any, record)):
        value = getattr(record, field.name)
        if isinstance(value, str) and '\0' in value:
            yield f'{field.name} has a zero byte'
        elif isinstance(value, int) and value > _HIGHEST.get(field.name, value):
            yield f'{field.name} is {value}, above {_HIGHEST[field.name]}'
        elif isinstance(value, Struct):
            yield from flaws(value, size_of)
        elif isinstance(value, tuple):
            for one in value:
                if isinstance(one, Struct):
                    yield from flaws(one, size_of)
    if (link := getattr(record, 'link', '')) and not is_link(link):
        yield f'link is {link!r}, which is not the path of a file'
    match record:
        case Extent(part, offset, length):
            if offset % PAGE or offset + length > size_of(data_name(part)):
                yield f'bytes {offset} to {offset + length} are not in {data_name(part)}'
        case TerminalState(settings, locks):
            if (len(settings), len(locks)) != (TERMIOS_SIZE, LOCKED_SIZE):
                yield f'the settings of a terminal have {len(settings)} and {len(locks)} bytes'
        case ContentSegment(start, extent):
            if start + extent.length > MAX_FILE:
                yield f'its content is at byte {start}'
        case SocketFilter(program, _):
            if len(program) % SOCK_FILTER.size or len(program) > BPF_MAXINSNS * SOCK_FILTER.size:
                yield f'a socket filter of {len(program)} bytes'
        case Lock(kind, write, start, end, _, breaking):
            if not POSIX <= kind <= LEASE or start > min(end, MAX_FILE) or MAX_FILE < end < EOF:
                yield f'a lock of kind {kind} on bytes {start} to {end}'
            if breaking and (kind != LEASE or breaking > TO_NONE or (breaking == TO_READ and not write)):
                yield f'a lock of kind {kind} that is being broken to {breaking}'
