# SPDX-License-Identifier: LGPL-2.1-or-later
"""What dead owners left: every freeze in the journal that nobody holds is undone."""

from collections.abc import Iterable

from ckptd.journal.actions import Actions, UnitCall, describe, undo_all
from ckptd.journal.entry import JournalEntry
from ckptd.journal.steps import AnyStep, KeepFile, MakeFile, MakeSegment
from ckptd.journal.store import Journal
from ckptd.kernel.cgroup import mount_of
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.task import boot_id


def recover(journal: Journal, thaw_unit: UnitCall | None = None, freeze_unit: UnitCall | None = None, *,
            files: bool = False) -> list[str]:
    """Undo each entry whose owner is dead; one sentence for each thing done or not done. Twice does no harm.

    files: those that are about files, which a sandbox may hide, and that take a process of one thread; else all others.

    Owners that live are left alone. A worker that was killed holds its lock until it is a zombie: wait for it first.
    An entry that cannot be undone wholly stays, for the next time. OSError if the journal itself cannot be read.
    """
    actions = Actions(mount_of(read_mountinfo()), freeze_unit, thaw_unit)
    report: list[str] = []
    for found in journal.claim():
        if isinstance(found, JournalEntry) and files != about_files(step for _, step in found.standing()):
            found.close()
        elif isinstance(found, JournalEntry):
            report += _recover_entry(found, actions)
        else:
            path, reason = found
            path.unlink(missing_ok=True)
            report.append(f'{path.name}: removed, it says nothing: {reason}')
    return report


def about_files(steps: Iterable[AnyStep]) -> bool:
    """Whether they are undone in a process of one thread, as they are about files or belong to a user."""
    return any(isinstance(step, KeepFile | MakeFile | MakeSegment) for step in steps)


def left_about_files(journal: Journal) -> bool:
    """Whether there is an entry, its owner dead, that `recover` passed over for being about files."""
    return any(not one.alive and about_files(one.steps) for one in journal.entries())


def _recover_entry(entry: JournalEntry, actions: Actions) -> list[str]:
    try:
        if entry.begin.boot != boot_id():
            entry.finish()
            return [f'{entry.name}: removed, it is of an earlier boot']
        damage = [f'{entry.name}: {entry.damaged} damaged lines'] if entry.damaged else []
        done = [f'{entry.name}: undone {describe(step)}' for _, step in entry.standing()]
        failures = undo_all(entry, actions)
        return damage + ([f'{entry.name}: {failure}' for failure in failures] or done)
    finally:
        entry.close()
