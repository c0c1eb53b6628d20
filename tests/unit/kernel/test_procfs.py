# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading files of /proc."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.kernel.procfs import list_numbers, read_file, read_memory_file, read_task_file, text


@pytest.mark.parametrize('size', [0, 1, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, 3 << 14])
def test_whole_files_of_any_size(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / 'file').write_bytes(content)
    assert read_file(str(tmp_path / 'file')) == content


def test_a_missing_file_of_a_live_task_is_not_its_death() -> None:
    with pytest.raises(FileNotFoundError):
        read_task_file('/proc/self', 'no such file')
    with pytest.raises(ProcessLookupError):
        read_task_file(f'/proc/{2**22 + 1}', 'stat')
    with pytest.raises(ProcessLookupError):
        read_memory_file(f'/proc/{2**22 + 1}', 'maps')


def test_a_file_held_open_over_a_death(forked: Callable[..., int]) -> None:
    pid = os.posix_spawn('/bin/true', ['true'], {})
    fd = os.open(f'/proc/{pid}/stat', os.O_RDONLY)
    try:
        os.waitpid(pid, 0)
        with pytest.raises(ProcessLookupError):
            os.read(fd, 100)
    finally:
        os.close(fd)


def test_numbers_only() -> None:
    assert os.getpid() in list_numbers('/proc', '')
    assert list_numbers('/proc/self', 'task') == sorted(list_numbers('/proc/self', 'task'))


def test_text_gives_its_bytes_back() -> None:
    data = bytes(range(1, 256))
    assert os.fsencode(text(data)) == data
