# SPDX-License-Identifier: LGPL-2.1-or-later
"""The target of an operation: a process, a systemd unit, a cgroup or the caller. Its text is parsed once, where it
enters ckptd, and is a value from there on. Pure.

    text            value                        str(value)
    pid:007         ProcessTarget(7)             pid:7
    app             UnitTarget('app.service')    app.service
    cgroup:/a//b/   CgroupTarget('/a/b')         cgroup:/a/b
    self            CALLER, then ProcessTarget(pid of the caller)

`str` gives the text for messages, the bus, the journal and images. Each value has one text and each text one value, so
equal targets are equal values.
"""

import re
from typing import Annotated, Final

import msgspec

from ckptd.errors import InvalidArgument, NoSuchTarget

MAX_PATH = 4096             # PATH_MAX of <linux/limits.h>, with a NUL at the end
MAX_PID = 0x3fffffff        # no tid is above FUTEX_TID_MASK (<linux/futex.h>), whatever pid_max says
UNIT_TYPES = ('service', 'scope', 'slice', 'socket', 'mount', 'swap')       # the units that have a cgroup
WITHOUT_CGROUP = ('target', 'device', 'automount', 'timer', 'path')         # all other types of systemd.unit(5)
PROCESS: Final = 'pid:'
CGROUP: Final = 'cgroup:'

# The rule of unit_name_is_valid() in systemd's src/basic/unit-name.c, for names and for instances of templates. A name
# that begins like another target cannot be written as a target; its cgroup can.
UNIT_NAME = rf'\A(?!pid:|cgroup:)[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\@-]+)?\.({"|".join(UNIT_TYPES)})\Z'
# The kernel makes no cgroup with a newline in its name (cgroup_mkdir() in kernel/cgroup/cgroup.c), and a name has at
# most NAME_MAX bytes.
CGROUP_PATH = r'\A(/|(/(?!\.{1,2}(/|\Z))[^/\0\n]{1,255})+)\Z'

Pid = Annotated[int, msgspec.Meta(ge=1, le=MAX_PID)]
UnitName = Annotated[str, msgspec.Meta(pattern=UNIT_NAME, max_length=255)]
CgroupPath = Annotated[str, msgspec.Meta(pattern=CGROUP_PATH, max_length=MAX_PATH - 1)]


class ProcessTarget(msgspec.Struct, frozen=True, tag='process'):
    """A process and its descendants."""
    pid: Pid        # as the daemon sees it

    def __str__(self) -> str:
        return f'{PROCESS}{self.pid}'


class UnitTarget(msgspec.Struct, frozen=True, tag='unit'):
    """All processes of a systemd unit."""
    name: UnitName      # with its suffix

    @property
    def is_program(self) -> bool:
        """Whether its manager starts and stops its processes as one program. A slice has other units, and the processes
        of the other types are helpers of systemd."""
        return self.name.endswith(('.service', '.scope'))

    def __str__(self) -> str:
        return self.name


class CgroupTarget(msgspec.Struct, frozen=True, tag='cgroup'):
    """All processes in a cgroup and in those below it."""
    path: CgroupPath    # below the v2 mount, as in /proc/PID/cgroup; no '.', '..' or empty part

    def __str__(self) -> str:
        return f'{CGROUP}{self.path}'


class CallerTarget(msgspec.Struct, frozen=True, tag='self'):
    """The calling process and its descendants."""

    def __str__(self) -> str:
        return 'self'

    def process(self, pid: int) -> ProcessTarget:
        """Return the calling process. pid: 0 if the bus does not tell it, which is NoSuchTarget."""
        if not pid:
            raise NoSuchTarget('the bus does not tell the pid of the caller', resource='self',
                               hint='name the process: pid:N')
        return ProcessTarget(pid)


Target = ProcessTarget | UnitTarget | CgroupTarget      # a tree, whoever asks for it
AnyTarget = Target | CallerTarget                       # a tree as a caller names it

CALLER: Final = CallerTarget()
WORDS: Final = NoSuchTarget.default_hint


def parse_target(text: str) -> AnyTarget:
    """Parse the text of a target. A name without a dot is a service, as for systemctl. InvalidArgument."""
    if text == str(CALLER):
        return CALLER
    if text.startswith(PROCESS):
        number = text.removeprefix(PROCESS)
        value: AnyTarget = ProcessTarget(int(number) if re.fullmatch('[0-9]{1,20}', number, re.ASCII) else 0)
        hint = 'write pid:N with the number N of a process'
    elif text.startswith(CGROUP):
        value = CgroupTarget(clean_path(text.removeprefix(CGROUP)))
        hint = 'write cgroup:/PATH as /proc/PID/cgroup shows it'
    else:
        value = UnitTarget(text if '.' in text else f'{text}.service')
        hint = _unit_hint(text)
    if is_valid(value):
        return value
    raise InvalidArgument(f'{text[:80]!r} is not a target', resource='target', hint=f'{hint}; {WORDS}')


def is_valid(target: AnyTarget) -> bool:
    """Whether the value keeps the rules of its class. msgspec checks them where it decodes a value, but not where the
    program makes one."""
    try:
        msgspec.convert(msgspec.to_builtins(target), type(target))
    except msgspec.ValidationError:
        return False
    return True


def clean_path(path: str) -> str:
    """Return the path of a cgroup without empty parts, '.' and a slash at its end. '' if it is not absolute."""
    return '/' + '/'.join(part for part in path.split('/') if part not in ('', '.')) if path.startswith('/') else ''


def _unit_hint(text: str) -> str:
    suffix = text.rpartition('.')[2]
    if suffix in WITHOUT_CGROUP:
        return f'a {suffix} unit has no processes'
    return f'the name of a unit ends in {", ".join(f".{name}" for name in UNIT_TYPES[:-1])} or .{UNIT_TYPES[-1]}'
