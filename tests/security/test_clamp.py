# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits and priorities beyond what whoever asks may set: refused by name, and with `clamp` the nearest is taken."""

import dataclasses
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckptd.image.records import PAGE, Limit
from ckptd.kernel.sched import ioprio_get
from ckptd.kernel.task import read_limits
from tests.lib.bus import Served
from tests.lib.imgedit import ImageStream
from tests.security.attacker import Attacker, status

LOCKED = 16 * PAGE
SOURCE = f"""
page = mmap.mmap(-1, {LOCKED}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.c_char.from_buffer(page)
assert libc.mlock(ctypes.byref(address), {LOCKED}) == 0
ready()
while True:
    wait_for_go()
    say('here')
"""
INFINITY = (1 << 64) - 1


def with_limit(number: int, limit: Limit) -> Callable[[ImageStream], int]:
    def change(one: Any) -> Any:
        return dataclasses.replace(one, limits=(*one.limits[:number], limit, *one.limits[number + 1:]))
    return lambda image: image.change('Limits', change)


def with_fields(name: str, **fields: Any) -> Callable[[ImageStream], int]:
    return lambda image: image.alter(name, **fields)


class Claim(NamedTuple):
    """change: what the image says. resource: what is refused. after: what the process has then, by its pid."""
    change: Callable[[ImageStream], int]
    resource: str
    after: Callable[[int], object]
    wanted: object


BOUNDING = int(status(os.getpid())['CapBnd'], 16)
CLAIMS = {
    'limit': Claim(with_limit(resource.RLIMIT_NOFILE, Limit(9, INFINITY)), 'RLIMIT_NOFILE',
                   lambda pid: read_limits(pid)[resource.RLIMIT_NOFILE],
                   (9, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
    'oom_score_adj': Claim(with_fields('ProcessState', oom_score_adj=0), 'oom_score_adj',
                           lambda pid: Path(f'/proc/{pid}/oom_score_adj').read_text(),
                           Path('/proc/self/oom_score_adj').read_text()),
    'nice': Claim(with_fields('Scheduling', nice=0), 'scheduling', lambda pid: os.getpriority(os.PRIO_PROCESS, pid),
                  os.getpriority(os.PRIO_PROCESS, 0)),
    'real-time': Claim(with_fields('Scheduling', policy=os.SCHED_FIFO, priority=9), 'scheduling',
                       lambda pid: (os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority),
                       (os.SCHED_OTHER, 0)),
    'deadline': Claim(with_fields('Scheduling', policy=6, runtime=10**7, deadline=10**8, period=10**8), 'scheduling',
                      os.sched_getscheduler, os.SCHED_OTHER),
    'I/O priority': Claim(with_fields('Scheduling', ioprio=1 << 13), 'I/O priority', ioprio_get, 2 << 13),
    'bounding set': Claim(with_fields('Credentials', capabilities=(0, 0, 0, 0, 0)), 'capabilities',
                          lambda pid: int(status(pid)['CapBnd'], 16), BOUNDING),
}


@pytest.mark.parametrize('claim', CLAIMS.values(), ids=CLAIMS)
def test_more_than_may_be_set(served: Served, attacker: Attacker, claim: Claim) -> None:
    program = attacker.start(SOURCE)
    image = attacker.take(program)
    assert claim.change(image) >= 1
    error = attacker.restore(image).error
    assert error is not None
    assert {row.resource for row in error.refusals} == {claim.resource}
    assert all('--clamp' in row.hint for row in error.refusals)
    outcome = attacker.restore(image, clamp=True)
    assert outcome.root == program.pid, outcome.words
    [warning] = [row for row in outcome.warnings if row.resource == claim.resource]
    assert warning.severity == 'warning'
    assert 'it comes back with' in warning.hint
    assert claim.after(program.pid) == claim.wanted
    assert program.ask() == 'here'


def test_locked_memory(served: Served, attacker: Attacker) -> None:
    """As much as whoever asks may have locked."""
    program = attacker.start(SOURCE)
    assert status(program.pid)['VmLck'].split()[0] == str(LOCKED >> 10)
    image = attacker.take(program)
    attacker.before.append(lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE)))
    error = attacker.restore(image).error
    assert error is not None
    assert {row.resource for row in error.refusals} == {'RLIMIT_MEMLOCK', 'locked memory'}
    outcome = attacker.restore(image, clamp=True)
    assert outcome.root == program.pid, outcome.words
    assert status(program.pid)['VmLck'].split()[0] == '0'
    assert read_limits(program.pid)[resource.RLIMIT_MEMLOCK] == (PAGE, PAGE)
    assert program.ask() == 'here'


def test_more_than_the_soft_limit_of_the_asker_is_locked(served: Served, attacker: Attacker) -> None:
    """The program had raised its own, which anybody may, and so does what restores it."""
    program = attacker.start(SOURCE)
    image = attacker.take(program)
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    attacker.before.append(lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, hard)))
    outcome = attacker.restore(image)
    assert outcome.root == program.pid, outcome.words
    assert status(program.pid)['VmLck'].split()[0] == str(LOCKED >> 10)


def test_what_is_no_matter_of_more_or_less(served: Served, attacker: Attacker) -> None:
    image = attacker.take(attacker.start(SOURCE))
    image.alter('Credentials', securebits=1)
    error = attacker.restore(image, clamp=True).error
    assert error is not None
    assert {row.resource for row in error.refusals} == {'securebits'}
