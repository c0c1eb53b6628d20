# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pictures of victims before and after: what ckptd may not change, and the little that it may."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ckptd.image.verify import verify
from ckptd.kernel.cgroup import find_mount
from tests.lib.procdiff import Picture, differences, take_picture, whole_tasks
from tests.lib.victim import BRIEF, RESTLESS, Victim

SETTLE = 20.0       # seconds: what was let go a moment ago is still on its way


def look(victim: Victim) -> Picture:
    return take_picture(victim.pid, moving=victim.name in RESTLESS | BRIEF)


def changes(before: Picture, after: Picture, *, brief: bool = False) -> list[str]:
    """What is not as it was. brief: threads may have ended.

    Two things may change. A sleep that was interrupted goes on as restart_syscall(2), number 219, as after any SIGSTOP.
    The code of the remote calls lay in the vdso, so a page of it is the process's own now, with the bytes as before.
    """
    vdso = {(task, name) for (task, source, name), value in before.rows.items()
            if source == 'maps' and value.endswith('[vdso]')}
    expected, found = Picture(dict(before.rows)), Picture(dict(after.rows))
    tasks = whole_tasks(before, after)
    for key in before.rows:
        task, source, name = key
        if brief and (task not in tasks or name in ('threads', 'Threads')):
            expected.rows.pop(key)
            found.rows.pop(key, None)
        elif (source, name) == ('file', 'syscall') and found.rows.get(key) == '219':
            expected.rows[key] = '219'
        elif source == 'maps pages' and (task, name) in vdso and key in found.rows:
            expected.rows[key] = found.rows[key]
    return differences(expected, found)


@dataclass
class Subject:
    """A victim, and what it was before."""
    victim: Victim
    before: Picture

    @classmethod
    def of(cls, victim: Victim) -> Self:
        return cls(victim, look(victim))

    def wrong(self) -> list[str]:
        """What is wrong with it; empty if it was let go unharmed."""
        deadline = time.monotonic() + SETTLE
        while (found := self._wrong()) and time.monotonic() < deadline:
            os.sched_yield()
        return found

    def _wrong(self) -> list[str]:
        try:
            after = look(self.victim)
        except (FileNotFoundError, ProcessLookupError):
            return [f'{self.victim} is gone']
        return [*changes(self.before, after, brief=self.victim.name in BRIEF), *_held(self.victim.pid)]

    def finish(self) -> list[str]:
        """Have it check itself; what it says where it is not satisfied."""
        with contextlib.suppress(ProcessLookupError):
            self.victim.go()
        try:
            self.victim.expect_success()
        except AssertionError as error:
            return [str(error)]
        return []


def _held(pid: int) -> Iterator[str]:
    """Stopped or traced tasks of the process, a frozen cgroup, work cgroups beside it."""
    for task in Path(f'/proc/{pid}/task').iterdir():
        try:
            text = (task / 'status').read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue        # a thread that has ended is held by nobody
        fields = dict(line.split(':\t', 1) for line in text.splitlines() if ':\t' in line)
        if fields['TracerPid'] != '0' or fields['State'][0] in 'Tt':
            yield f'{task.name} is in state {fields["State"]}, traced by {fields["TracerPid"]}'
    mount = find_mount()
    if mount is not None:
        home = mount.directory(Path(f'/proc/{pid}/cgroup').read_text().rpartition('0::')[2].strip())
        if (home / 'cgroup.freeze').exists() and 'frozen 1' in (home / 'cgroup.events').read_text():
            yield f'{home} is frozen'
        yield from (f'{work} was left' for work in home.glob('ckptd-*-*') if not work.name.startswith('ckptd-tests'))


def left_in_spool(spool: Path) -> Iterator[str]:
    """What was never published, and damages of what was."""
    for path in spool.iterdir():
        if path.name.startswith('.'):
            yield f'{path.name} in the spool'
        else:
            yield from (f'{path.name}: {damage}' for damage in verify(path))


def left_in_journal(runtime: Path) -> Iterator[str]:
    yield from (f'journal entry {path.read_text()!r}' for path in (runtime / 'freezes').glob('*.jsonl'))
