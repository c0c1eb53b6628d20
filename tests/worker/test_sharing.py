# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes that share what only threads share as a rule: each shared object has one id and one record."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.image.reader import ImageReader
from ckptd.image.records import FdTable, Fs, Mm, SignalActions
from ckptd.kernel.kcmp import EQUAL, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_VM, kcmp
from tests.lib.victim import Victim
from tests.worker.driver import Place

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

OBJECTS = {'mm_id': (KCMP_VM, Mm), 'files_id': (KCMP_FILES, FdTable), 'fs_id': (KCMP_FS, Fs),
           'sighand_id': (KCMP_SIGHAND, SignalActions)}


@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
def test_ids_are_equal_where_the_objects_are(victim: Callable[..., Victim], tmp_path: Path, freeze: str) -> None:
    running = victim('sharing')
    with ImageReader(Place(tmp_path).make().checkpoint(running.pid, freeze=freeze)) as reader:
        tasks = [task.record for task in reader.tasks]
        assert len(tasks) == len(reader.processes) == 13
        for name, (kind, record) in OBJECTS.items():
            ids = [getattr(task, name) for task in tasks]
            assert set(ids) == set(reader.table(record))
            assert 1 < len(set(ids)) < len(ids)
            for one in tasks:
                for other in tasks:
                    same = kcmp(one.vpid, other.vpid, kind) == EQUAL
                    assert (getattr(one, name) == getattr(other, name)) == same
    running.finish()
