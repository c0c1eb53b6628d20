# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines about who was allowed what: whatever is in the names of things, and however many there are."""

import asyncio
import logging
from collections.abc import Iterator

import pytest

from ckptd.jobs import audit as audit_module
from ckptd.jobs.audit import LONGEST, MOST, audit, flush


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The clock, which stands still but for the test."""
    clock = [1000.0]
    monkeypatch.setattr(audit_module.time, 'monotonic', lambda: clock[0])
    audit_module._seconds.clear()
    yield clock
    audit_module._seconds.clear()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, now: list[float]) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, 'ckptd.audit')
    return caplog


def test_a_line(log: pytest.LogCaptureFixture) -> None:
    audit('refused', 'ptrace', operation='freeze', uid=1000, what='pid:7', name='a\nallowed uid=0 "x')
    assert log.messages == ['refused operation=freeze uid=1000 what=pid:7 name="a\\nallowed uid=0 \\"x" rule=ptrace']


def test_a_long_value_is_cut(log: pytest.LogCaptureFixture) -> None:
    audit('refused', 'limits', uid=1, what='/' + 'a' * 60_000)
    assert len(log.messages[0]) < LONGEST + 60


async def test_one_user_does_not_fill_the_log(log: pytest.LogCaptureFixture, now: list[float]) -> None:
    for number in range(MOST + 50):
        audit('refused', 'limits', uid=1000, number=number)
    audit('allowed', 'owner', uid=1001, what='x')
    assert len(log.messages) == MOST + 1
    now[0] += 1.0
    audit('refused', 'limits', uid=1000, number=7)
    assert log.messages[-2:] == ['more refused uid=1000 rule=limits decisions=50',
                                 'refused uid=1000 number=7 rule=limits']


async def test_what_is_asked_often_leaves_nothing_else_out(log: pytest.LogCaptureFixture) -> None:
    for number in range(MOST + 50):
        audit('allowed', 'everybody', method='ListJobs', uid=1000)
        audit('refused', 'not theirs to see', method=f'Made{number}', uid=1000)
    audit('refused', 'org.ckptd1.freeze', method='Freeze', uid=1000, what='pid:1')
    audit('allowed', 'owner', method='Freeze', uid=1000, what='pid:7')
    audit('refused', 'ptrace', operation='freeze', uid=1000, what='pid:8')
    assert [line.partition(' ')[2] for line in log.messages[2 * MOST:]] == [
        'method=Freeze uid=1000 what=pid:1 rule=org.ckptd1.freeze', 'method=Freeze uid=1000 what=pid:7 rule=owner',
        'operation=freeze uid=1000 what=pid:8 rule=ptrace']
    flush()
    assert log.messages[2 * MOST + 3:] == ['more allowed uid=1000 method=ListJobs decisions=50',
                                           'more refused uid=1000 rule="not theirs to see" decisions=50']
    assert not audit_module._seconds


async def test_how_many_were_left_out_is_said_if_nothing_follows(caplog: pytest.LogCaptureFixture) -> None:
    said = asyncio.Event()

    class Ears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith('more'):
                said.set()

    caplog.set_level(logging.INFO, 'ckptd.audit')
    ears = Ears()
    audit_module.log.addHandler(ears)
    try:
        for number in range(MOST + 2):
            audit('refused', 'org.ckptd1.freeze', method='Freeze', uid=1000, what=f'pid:{number}')
        await said.wait()
    finally:
        audit_module.log.removeHandler(ears)
        flush()
    assert caplog.messages[MOST:] == ['more refused uid=1000 method=Freeze decisions=2']


def test_root_is_written_down_whatever_he_does(log: pytest.LogCaptureFixture) -> None:
    for number in range(MOST + 50):
        audit('allowed', 'root', uid=0, number=number)
    assert len(log.messages) == MOST + 50


def test_users_of_yesterday_are_forgotten(now: list[float], log: pytest.LogCaptureFixture) -> None:
    for uid in range(1000, 1100):
        audit('allowed', 'owner', uid=uid)
    now[0] += 61.0
    audit('allowed', 'owner', uid=1)
    assert list(audit_module._seconds) == [1]
