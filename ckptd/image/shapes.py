# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules for the fields of a record that the grammar does not express: lengths of lists, and bounds of numbers.

All code that reads an image relies on them. `verify` reports every violation; the reader rejects the first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

from ckptd.image.grammar import RECORDS, Record
from ckptd.image.records import (
    PAGE,
    Backing,
    Credentials,
    FdTable,
    Fs,
    Header,
    IntervalTimers,
    Limits,
    Mm,
    PosixTimers,
    ProcessState,
    Registers,
    SavedFile,
    Scheduling,
    SharedMemory,
    SignalActions,
    TaskIds,
    TaskRecord,
    ThreadSignals,
)

MAX_FILE = (1 << 63) - 1        # off_t, <asm-generic/posix_types.h>
MAX_FD = (1 << 30) - 1          # the hard maximum of fs.nr_open on 64 bit is below (fs/file.c, sysctl_nr_open_max)
MAX_PID = (1 << 31) - 1         # pid_t
EM_X86_64, GPR_X86_64 = 62, 216         # <linux/elf-em.h>; sizeof(struct user_regs_struct), <asm/user_64.h>
_SIGINFO = 128                          # sizeof(siginfo_t)
_SIGNALS = 64
_MAX_NOTIFY = 7                         # SIGEV_* of <asm-generic/siginfo.h>

# items of a list of fixed length
_LENGTHS: dict[type[Record], dict[str, int]] = {
    Credentials: {'uids': 4, 'gids': 4, 'capabilities': 5},
    Limits: {'limits': 16},
    IntervalTimers: {'timers': 3},
    SignalActions: {'actions': _SIGNALS},
    Mm: {'layout': 11},
}
# bytes of each item of a list
_SIZES: dict[type[Record], dict[str, int]] = {
    ThreadSignals: {'pending': _SIGINFO},
    ProcessState: {'shared_pending': _SIGINFO},
}
# the highest value of a number
_HIGHEST: dict[type[Record], dict[str, int]] = {
    Header: {'root': MAX_PID},
    TaskRecord: {'vpid': MAX_PID, 'parent': MAX_PID},
    Scheduling: {'nice': 39, 'ioprio': (1 << 31) - 1},
    ProcessState: {'oom_score_adj': 2000, 'tpgid': MAX_PID},
    SavedFile: {'owner': MAX_PID, 'owner_type': 2, 'owner_signal': _SIGNALS},
    SharedMemory: {'size': MAX_FILE},
    Backing: {'size': MAX_FILE},
}


def flaws(one: Record) -> Iterator[str]:
    """Yield violations within a record, one sentence each that begins with the field."""
    for rule in _RULES[type(one)]:
        yield from rule(one)


def tree_flaws(tasks: Iterable[tuple[int, int, int]]) -> Iterator[str]:
    """Yield violations of the order of tasks, given as (vpid, vtgid, parent): depth first, each after the leader of its
    process and after the task that created it."""
    leaders: set[int] = set()
    seen = {0}
    for vpid, vtgid, parent in tasks:
        if vpid == vtgid:
            leaders.add(vpid)
        if vtgid not in leaders:
            yield f'task {vpid} does not follow the leader {vtgid} of its process'
        if parent not in seen:
            yield f'task {vpid} does not follow its parent {parent}'
        seen.add(vpid)


class _Rule(NamedTuple):
    """A bound of a field: its exact length, the size of its items, or its highest value."""
    field: str
    bound: int

    def length(self, one: Record) -> Iterator[str]:
        if (found := len(getattr(one, self.field))) != self.bound:
            yield f'{self.field} has {found} items, not {self.bound}'

    def size(self, one: Record) -> Iterator[str]:
        if any(len(item) != self.bound for item in getattr(one, self.field)):
            yield f'{self.field} has an item that is not of {self.bound} bytes'

    def text(self, one: Record) -> Iterator[str]:
        if '\0' in getattr(one, self.field):        # names and paths of the kernel end there
            yield f'{self.field} has a zero byte'

    def highest(self, one: Record) -> Iterator[str]:
        if (found := getattr(one, self.field)) > self.bound:
            yield f'{self.field} is {found}, above {self.bound}'


# ---------------------------------------------------------------- rules of one class

def _ids(one: TaskIds) -> Iterator[str]:
    lists = (one.vpid, one.vtgid, one.vppid, one.vpgid, one.vsid)
    if any(number > MAX_PID for found in lists for number in found):
        yield f'an id above {MAX_PID}'


def _registers(one: Registers) -> Iterator[str]:
    if one.machine == EM_X86_64 and len(one.gpr) != GPR_X86_64:
        yield f'gpr has {len(one.gpr)} bytes, not {GPR_X86_64}'


def _limits(one: Limits) -> Iterator[str]:
    for number, limit in enumerate(one.limits):
        if limit.soft > limit.hard:
            yield f'limit {number} is {limit.soft}, above its hard limit {limit.hard}'


def _timers(one: PosixTimers) -> Iterator[str]:
    if any(timer.notify > _MAX_NOTIFY or timer.id > MAX_PID for timer in one.timers):
        yield 'a timer with an impossible notification or number'


def _fds(one: FdTable) -> Iterator[str]:
    numbers = [fd.fd for fd in one.fds]
    if not all(fd.file_id for fd in one.fds):
        yield 'an fd without a file'
    if len(numbers) != len(set(numbers)) or max(numbers, default=0) > MAX_FD:
        yield 'an fd number that is there twice or is too large'


def _paths(one: Fs) -> Iterator[str]:
    if not one.cwd or not one.root:
        yield 'a directory without a name'


def _content(one: Backing) -> Iterator[str]:
    if sum(extent.length for extent in one.content) > MAX_FILE or any(
            extent.length % PAGE for extent in one.content[:-1]):
        yield 'its content is not in whole pages'


_OWN: dict[type[Record], Sequence[Callable[[Any], Iterator[str]]]] = {
    TaskIds: [_ids], Registers: [_registers], Limits: [_limits], PosixTimers: [_timers], Fs: [_paths],
    Backing: [_content], FdTable: [_fds]}


def _table(rules: Mapping[type[Record], Mapping[str, int]], kind: Callable[[_Rule], Callable[[Record], Iterator[str]]]
           ) -> Iterator[tuple[type[Record], Callable[[Record], Iterator[str]]]]:
    for cls, fields in rules.items():
        for field, bound in fields.items():
            yield cls, kind(_Rule(field, bound))


def _all_rules() -> Mapping[type[Record], Sequence[Callable[[Any], Iterator[str]]]]:
    found: dict[type[Record], list[Callable[[Any], Iterator[str]]]] = {cls: [] for cls in RECORDS.values()}
    for cls, rules in _OWN.items():
        found[cls] += rules
    # a core can be exported from an image whose mapped file has an impossible name; `verify` reports it
    texts = {cls: {name: 0 for name, hint in get_type_hints(cls).items() if hint is str}
             for cls in RECORDS.values() if cls is not Backing}
    for cls, rule in (*_table(_LENGTHS, lambda one: one.length), *_table(_SIZES, lambda one: one.size),
                      *_table(_HIGHEST, lambda one: one.highest), *_table(texts, lambda one: one.text)):
        found[cls].append(rule)
    return found


_RULES = _all_rules()
