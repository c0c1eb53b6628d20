# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recovery: undo every freeze in the journal whose owner is dead."""

from collections.abc import Iterable
from pathlib import Path

from ckptd.journal.entry import JournalEntry
from ckptd.journal.steps import AnyStep, StepContext
from ckptd.journal.steps.base import UnitCall
from ckptd.journal.store import Journal
from ckptd.kernel.cgroup import mount_of
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.task import boot_id


def recover(journal: Journal, thaw_unit: UnitCall | None = None, freeze_unit: UnitCall | None = None, *,
            files: bool = False) -> list[str]:
    """Undo each entry whose owner is dead. Return one sentence for each thing done or not done. A second call is
    harmless.

    files: undo the entries about files, which a sandbox may hide and which need a process of one thread; else all
    others.

    Entries with a living owner are left alone. A killed worker holds its lock until it is a zombie, so wait for that
    first. An entry that cannot be undone completely stays for the next time. OSError if the journal itself cannot be
    read.
    """
    context = StepContext(mount_of(read_mountinfo()), freeze_unit, thaw_unit)
    report: list[str] = []
    for found in sorted(journal.claim(), key=_order):
        if isinstance(found, JournalEntry) and files != about_files(step for _, step in found.standing()):
            found.close()
        elif isinstance(found, JournalEntry):
            report += _recover_entry(found, context)
        else:
            path, reason = found
            path.unlink(missing_ok=True)
            report.append(f'{path.name}: removed, it is unreadable: {reason}')
    return report


def _order(found: JournalEntry | tuple[Path, str]) -> bool:
    return not (isinstance(found, JournalEntry) and any(step.before_thaw for _, step in found.standing()))


def about_files(steps: Iterable[AnyStep]) -> bool:
    """Whether the steps must be undone in a process of one thread, because they are about files or belong to a user."""
    return any(step.by_user for step in steps)


def left_about_files(journal: Journal) -> bool:
    """Whether there is an entry of a dead owner that `recover` skipped because it is about files."""
    return any(not one.alive and about_files(one.steps) for one in journal.entries())


def _recover_entry(entry: JournalEntry, context: StepContext) -> list[str]:
    try:
        if entry.begin.boot != boot_id():
            entry.finish()
            return [f'{entry.name}: removed, it is of an earlier boot']
        damage = [f'{entry.name}: {entry.damaged} damaged lines'] if entry.damaged else []
        done = [f'{entry.name}: undone {step.describe()}' for _, step in entry.standing()]
        failures = entry.undo(context)
        return damage + ([f'{entry.name}: {failure}' for failure in failures] or done)
    finally:
        entry.close()
