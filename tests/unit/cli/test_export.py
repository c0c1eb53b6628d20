# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking a tar stream of cores apart."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from ckptd.cli.export import unpack_cores
from ckptd.errors import CkptError, ImageDamaged


def stream(*members: tuple[str, bytes | str]) -> io.BytesIO:
    """A tar stream; a member whose content is a str is a link to it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w|') as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return io.BytesIO(out.getvalue())


def test_cores_are_written_and_zeros_become_holes(tmp_path: Path) -> None:
    content = b'ELF' + bytes(8 << 20) + b'end'
    assert unpack_cores(stream(('core.1', content), ('core.22', b'')), tmp_path, False) == [
        ('core.1', len(content)), ('core.22', 0)]
    core = tmp_path / 'core.1'
    assert core.read_bytes() == content
    assert core.stat().st_blocks * 512 < len(content) // 2
    assert core.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize('name', ['core', 'core.x', '../core.1', '/core.1', 'dir/core.1', 'core.1/x', 'core.1\n'])
def test_other_names_are_refused_and_nothing_stays(name: str, tmp_path: Path) -> None:
    with pytest.raises(ImageDamaged, match='is not a core'):
        unpack_cores(stream(('core.1', b'x'), (name, b'y')), tmp_path, False)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_no_core(tmp_path: Path) -> None:
    with pytest.raises(ImageDamaged, match='is not a core'):
        unpack_cores(stream(('core.1', '/etc/passwd')), tmp_path, False)


def test_a_link_in_the_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / 'victim').write_text('precious')
    (tmp_path / 'core.1').symlink_to('victim')
    with pytest.raises(CkptError, match='exists already'):
        unpack_cores(stream(('core.1', b'x')), tmp_path, False)
    unpack_cores(stream(('core.1', b'x')), tmp_path, True)
    assert (tmp_path / 'victim').read_text() == 'precious'
    assert (tmp_path / 'core.1').read_bytes() == b'x'


def test_a_stream_cut_short_leaves_nothing(tmp_path: Path) -> None:
    whole = stream(('core.1', bytes(100)), ('core.2', os.urandom(5000))).getvalue()
    with pytest.raises(ImageDamaged, match='cut short'):
        unpack_cores(io.BytesIO(whole[:3000]), tmp_path, False)
    assert list(tmp_path.iterdir()) == []


def test_progress_names_the_core_and_counts_its_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    unpack_cores(stream(('core.1', bytes(3 << 20))), tmp_path, False, lambda name, done: seen.append((name, done)))
    assert seen[-1] == ('core.1', 3 << 20)
