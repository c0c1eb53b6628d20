# SPDX-License-Identifier: LGPL-2.1-or-later
"""checkpoint --save-files: what the tree writes is in the image as it was, within the limit, and only if asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.image.reader import ImageReader
from ckptd.image.records import SavedFile
from ckptd.image.verify import verify
from ckptd.objects.files.registry import BY_TAG
from ckptd.objects.files.regular import Regular
from tests.lib.victim import Victim
from tests.worker.driver import DirectWorker, Place

pytestmark = pytest.mark.needs('ptrace', 'gcc', 'root')


def files_of(reader: ImageReader) -> dict[str, Regular]:
    """Regular files by name, those that still have one."""
    found = [BY_TAG[one.kind].record.decode(one.data) for one in reader.every(SavedFile) if one.kind == 'regular']
    return {Path(one.path).name: one for one in found if isinstance(one, Regular) and not one.deleted}


def content_of(reader: ImageReader, record: Regular) -> bytes:
    content = bytearray(record.size)
    for segment in record.saved:
        data = b''.join(reader.read_extent(segment.extent))
        content[segment.start:segment.start + len(data)] = data
    return bytes(content)


def test_what_the_tree_writes_is_kept(victim: Callable[..., Victim], place: Place) -> None:
    running = victim('files')
    before = {name: (running.directory / name).read_bytes() for name in ('data', 'log')}
    image = place.checkpoint(running.pid, save_files=True)
    running.finish()
    assert verify(image) == []
    with ImageReader(image) as reader:
        files = files_of(reader)
        assert {name: content_of(reader, files[name]) for name in before} == before
        assert all(files[name].is_saved and files[name].tail for name in before)


def test_nothing_is_kept_unless_it_is_asked_for(victim: Callable[..., Victim], place: Place) -> None:
    running = victim('files')
    with ImageReader(place.checkpoint(running.pid)) as reader:
        assert [(one.is_saved, one.saved) for one in files_of(reader).values() if one.is_saved or one.saved] == []
        assert all(files_of(reader)[name].tail for name in ('data', 'log'))
    running.finish()


def test_what_is_above_the_limit_is_a_warning(victim: Callable[..., Victim], place: Place) -> None:
    running = victim('files')
    with DirectWorker() as worker:
        result = worker.run(place.request(running.pid, save_files=True, save_limit=10_000))
    warnings = [row for row in result['warnings'] if row['errno'] == 'EFBIG']
    assert [Path(row['reason'].split(' is not saved')[0]).name for row in warnings] == ['data']
    assert warnings[0]['pid'] == running.pid
    with ImageReader(place.spool / result['image']) as reader:
        assert [warning.errno for warning in reader.manifest.warnings if warning.errno == 'EFBIG'] == ['EFBIG']
        assert not files_of(reader)['data'].is_saved
        assert files_of(reader)['log'].is_saved
    running.finish()
