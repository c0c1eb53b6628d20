# SPDX-License-Identifier: LGPL-2.1-or-later
"""Image ids: always a directory name and an element of an object path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.image.ids import is_image_id, new_image_id


def test_an_id_says_when_and_what() -> None:
    image = new_image_id('Web Content', 1_706_745_599)
    assert image[:-4] == '20240131_235959_web_content_'
    assert is_image_id(image)


@given(st.text(max_size=20))
def test_any_command_gives_an_id(command: str) -> None:
    assert is_image_id(new_image_id(command))


@pytest.mark.parametrize('command', ['', '...', '\udcff'])
def test_a_command_without_letters(command: str) -> None:
    assert '_tree_' in new_image_id(command)


@pytest.mark.parametrize('text', ['', '.', '..', '20240131_235959_a_00f', '20240131_235959_A_00ff',
                                  '20240131_235959_a_00ff/', '20240131_235959_a_00ff\n',
                                  '\u0662' * 8 + '_235959_a_00ff'])
def test_what_is_no_id(text: str) -> None:
    assert not is_image_id(text)
