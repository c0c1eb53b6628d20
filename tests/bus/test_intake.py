# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which call is begun when: in turn between users, and of who is refused calls one now and then."""

import asyncio

import pytest

from ckptd.bus import intake
from ckptd.bus.intake import Intake
from ckptd.bus.message import MessageType
from ckptd.bus.turns import Turns
from ckptd.bus.wire import Received
from ckptd.errors import LimitsExceeded


class Calls:
    """What an Intake begins and turns away; who is who is known as soon as it is asked."""

    def __init__(self, **uids: int) -> None:
        self.begun: list[Received] = []
        self.refused: list[Received] = []
        self.uids = {f':{name}': uid for name, uid in uids.items()}
        self.intake = Intake(self.begun.append, lambda message, _: self.refused.append(message))
        self._serial = 0

    def come(self, name: str, size: int = 0) -> LimitsExceeded | None:
        self._serial += 1
        message = Received(MessageType.CALL, 0, self._serial, ord('l'), size, sender=f':{name}')
        error = self.intake.refusal(message)
        if error is None:
            self.intake.put(message)
        return error

    def identify(self) -> None:
        """As a router does, of the calls that have begun."""
        for message in self.begun:
            self.intake.belongs_to(message, self.uids[message.sender])

    @property
    def senders(self) -> list[str]:
        return [message.sender[1:] for message in self.begun]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def known(calls: Calls, *names: str) -> None:
    """Have these called once."""
    for name in names:
        calls.come(name)
        await turns(2)
    calls.identify()
    for message in calls.begun:
        calls.intake.finished(message)
    calls.begun.clear()
    await turns(2)


async def test_one_call_of_each_user_in_turn() -> None:
    calls = Calls(a1=1, a2=1, b=2)
    await known(calls, 'a1', 'a2', 'b')
    for _ in range(10):
        calls.come('a1')
        calls.come('a2')
    calls.come('b')
    await turns(2)
    assert 'b' in calls.senders[:3]
    await turns(20)
    assert calls.senders.count('a1') == calls.senders.count('a2') == 10


async def test_until_its_user_is_known_a_connection_has_one_call_begun() -> None:
    calls = Calls(a=1)
    for _ in range(5):
        calls.come('a')
    await turns(10)
    assert calls.senders == ['a']
    calls.identify()
    await turns(10)
    assert [message.serial for message in calls.begun] == [1, 2, 3, 4, 5]


async def test_a_call_of_which_nothing_comes_lets_the_next_one_try() -> None:
    calls = Calls(a=1)
    for _ in range(3):
        calls.come('a')
    for number in range(3):
        calls.intake.finished(calls.begun[number])
        await turns(3)
    assert len(calls.begun) == 3
    assert calls.intake.count == 0


async def test_what_is_too_much_of_a_user_is_turned_away_when_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, 'MAX_CALLS_OF_USER', 4)
    calls = Calls(a=1)
    for _ in range(6):
        assert calls.come('a') is None
    calls.identify()
    assert len(calls.refused) == 2
    assert calls.intake.count == 4
    error = calls.come('a')
    assert error is not None
    assert 'more than 4 calls of uid 1' in error.message


@pytest.mark.parametrize(('limit', 'value', 'words'), [
    ('MAX_CALLS', 3, 'more than 3 calls at a time'), ('MAX_CALLS_IN_ALL', 3, 'ckptd has 3 calls to answer'),
    ('MAX_CALLS_OF_UNKNOWN', 2, '2 calls of new connections')])
async def test_limits(limit: str, value: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, limit, value)
    calls = Calls(a=1)
    errors = [calls.come('a') for _ in range(4)]
    assert errors[:3] == [None] * 3
    assert words in str(errors[3])


async def test_arguments_that_wait_are_bounded() -> None:
    calls = Calls(a=1)
    errors = [calls.come('a', intake.MAX_WAITING // 4) for _ in range(6)]
    assert errors[:5] == [None] * 5         # the first one does not wait
    assert 'MiB of arguments' in str(errors[5])


async def test_who_is_refused_calls_has_few_begun_and_others_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, 'PACE', 100.0)
    monkeypatch.setattr(intake, 'NOISY', 100.0)
    monkeypatch.setattr(intake, 'MAX_CALLS', 8)
    calls = Calls(a=1, b=2)
    await known(calls, 'a', 'b')
    while calls.come('a') is None:
        pass
    await turns(20)
    begun = calls.senders.count('a')
    assert begun <= 4       # of the eight: one at once, two in a turn, and one since
    for _ in range(5):
        calls.come('b')
    await turns(10)
    assert calls.senders[begun:] == ['b'] * 5
    for message in calls.intake.clear():
        assert message.sender == ':a'
    assert calls.intake.count == len(calls.begun)


async def test_and_all_of_them_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, 'MAX_CALLS', 8)
    calls = Calls(a=1)
    await known(calls, 'a')
    while calls.come('a') is None:
        pass
    async with asyncio.timeout(10):
        while len(calls.begun) < 8:     # noqa: ASYNC110 - by a timer of its own
            await asyncio.sleep(intake.PACE / 2)


def test_queues_in_turn() -> None:
    queues: Turns[str] = Turns()
    for item in ('a1', 'a2', 'a3', 'b1', 'c1', 'c2'):
        queues.put(item[0], item, 10)
    assert (queues.count, queues.size, queues.size_of('a'), 'b' in queues) == (6, 60, 30, True)
    assert [queues.take() for _ in range(4)] == ['a1', 'b1', 'c1', 'a2']
    assert queues.take(lambda key: key == 'c') == 'c2'
    assert queues.take(lambda key: key == 'c') is None
    assert queues.take_all('a') == ['a3']
    assert (queues.count, queues.size, queues.take(), queues.size_of('a')) == (0, 0, None, 0)
