# SPDX-License-Identifier: LGPL-2.1-or-later
"""Places in turn: whoever asks for many delays another one by one at most."""

import asyncio

import pytest

from ckptd.jobs.slots import Slots


class Crowd:
    """Requests of users, and in which order they got their places."""

    def __init__(self, places: int, each: int = 1000) -> None:
        self.slots = Slots(places, each)
        self.got: list[int] = []
        self.released = 0
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, *uids: int) -> None:
        for uid in uids:
            self.tasks.append(asyncio.create_task(self._ask(uid)))
            await asyncio.sleep(0)

    async def _ask(self, uid: int) -> None:
        await self.slots.acquire(uid)
        self.got.append(uid)

    async def release(self, times: int = 1) -> list[int]:
        """Who has had a place longest gives it back; who got one by it."""
        before = len(self.got)
        for _ in range(times):
            self.slots.release(self.got[self.released])
            self.released += 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return self.got[before:]


async def test_one_user_after_the_other() -> None:
    crowd = Crowd(1)
    await crowd.ask(1, 1, 1, 1, 2, 3, 2)
    assert crowd.got == [1]
    assert await crowd.release(6) == [1, 2, 3, 1, 2, 1]
    assert await crowd.release() == []
    await crowd.ask(4, 5)
    assert crowd.got[-1] == 4
    assert await crowd.release() == [5]


async def test_one_user_does_not_have_all_places() -> None:
    crowd = Crowd(3, 2)
    await crowd.ask(1, 1, 1, 2, 2)
    assert crowd.got == [1, 1, 2]
    assert await crowd.release() == [1]
    assert await crowd.release(2) == [2]
    await crowd.ask(0, 0, 0)
    assert crowd.got[-1:] == [0]
    assert await crowd.release(2) == [0, 0]


async def test_as_many_as_there_are_places() -> None:
    crowd = Crowd(3)
    await crowd.ask(1, 1, 1, 1)
    assert crowd.got == [1, 1, 1]
    assert await crowd.release() == [1]


@pytest.mark.parametrize('given', [False, True], ids=['waiting', 'given in the same moment'])
async def test_who_does_not_wait_any_more(given: bool) -> None:
    crowd = Crowd(1)
    await crowd.ask(1, 2, 3)
    if given:
        crowd.slots.release(1)
        crowd.released += 1
    crowd.tasks[1].cancel()
    await asyncio.wait([crowd.tasks[1]])
    if given:
        await asyncio.sleep(0)
        assert crowd.got == [1, 3]
    else:
        assert await crowd.release() == [3]
    await crowd.release()
    await crowd.ask(4)
    assert crowd.got == [1, 3, 4]
