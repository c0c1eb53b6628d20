# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thousandth of `make fuzz`: no crafted image and no message ends in an internal error, hangs or leaves anything."""

import random

import pytest

from tests.fuzz.bases import FEW, user_in
from tests.fuzz.looking import look_at
from tests.fuzz.messages import flood
from tests.fuzz.restoring import restore_all

IMAGES, RESTORED, MESSAGES = 100, 5, 100


@pytest.fixture
def seed() -> int:
    """Printed where the test fails."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f'make fuzz SEED={seed}')
    return seed


@pytest.mark.needs('gcc')
def test_crafted_images(seed: int) -> None:
    with user_in() as user, user.images(FEW) as images:
        looked = look_at(user, images, range(IMAGES), seed, 1)
        restored = restore_all(user, images, range(RESTORED), seed)
    assert looked.findings + restored.findings == []
    assert sum(number for outcome, number in looked.counts.items() if outcome.startswith('check-restore')) == IMAGES
    assert sum(number for outcome, number in restored.counts.items() if outcome.startswith('restore')) == RESTORED


def test_random_messages(seed: int) -> None:
    report = flood(MESSAGES, seed)
    assert report.findings == []
    assert report.counts['sent'] == MESSAGES
