# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness of tests with polkit, tests/lib/polkit.py: each answer that a daemon can get is got here."""

import asyncio
from collections.abc import Iterator

import pytest

from ckptd.bus.client import connect
from tests.lib.polkit import AUTHORITY, NAME, OTHER_ACTIONS, OWN_ACTIONS, PATH, Polkit, Verdict, check
from tests.lib.systembus import USERS, start_time

OWN, OTHER = 'org.ckptd1.checkpoint-own', 'org.ckptd1.checkpoint'
RULE = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.ckptd1.freeze-own" && subject.user == "alice") return polkit.Result.NO;
    if (action.id == "org.ckptd1.freeze" && subject.user == "bob") return polkit.Result.YES;
});
"""


@pytest.fixture
def alices(polkit: Polkit) -> Iterator[int]:
    with polkit.user('alice').process() as pid:
        yield pid


@pytest.mark.parametrize(('actions', 'verdict'), [
    (OWN_ACTIONS, (True, False)), (OTHER_ACTIONS, (False, True)),
])
async def test_defaults(polkit: Polkit, alices: int, actions: tuple[str, ...], verdict: tuple[bool, bool]) -> None:
    for action in actions:
        answered = await polkit.check(alices, action)
        assert (answered.authorized, answered.challenge) == verdict, action


async def test_rules_by_user(polkit: Polkit, alices: int) -> None:
    polkit.set_rules(RULE)
    with polkit.user('bob').process() as bobs:
        assert await polkit.check(alices, 'org.ckptd1.freeze-own') == Verdict(False, False, {})
        assert await polkit.check(bobs, 'org.ckptd1.freeze-own') == Verdict(True, False, {})
        assert await polkit.check(bobs, 'org.ckptd1.freeze') == Verdict(True, False, {})
    polkit.set_rules('')
    assert (await polkit.check(alices, 'org.ckptd1.freeze-own')).authorized


async def test_rules_that_are_no_program_are_in_the_log(polkit: Polkit) -> None:
    polkit.set_rules('polkit.addRule(')
    assert 'SyntaxError' in polkit.log


async def test_nobody_to_ask(polkit: Polkit, alices: int) -> None:
    assert await polkit.check(alices, OTHER, interactive=True) == Verdict(False, True, {})


@pytest.mark.parametrize('says_yes', [True, False])
async def test_somebody_is_asked(polkit: Polkit, alices: int, says_yes: bool) -> None:
    async with polkit.agent(alices, says_yes=says_yes) as agent:
        assert not (await polkit.check(alices, OTHER)).authorized
        assert agent.asked == []        # not without the flag
        verdict = await polkit.check(alices, OTHER, interactive=True)
    assert (verdict.authorized, verdict.dismissed) == (says_yes, not says_yes)
    assert agent.asked == [OTHER]


async def test_an_agent_is_for_its_process_alone(polkit: Polkit, alices: int) -> None:
    with polkit.user('alice').process() as another:
        async with polkit.agent(alices) as agent:
            assert await polkit.check(another, OTHER, interactive=True) == Verdict(False, True, {})
            assert agent.asked == []


def test_users_may_not_ask_about_others(polkit: Polkit, alices: int) -> None:
    subject = ['unix-process', '3', 'pid', 'u', str(alices), 'start-time', 't', str(start_time(alices)), 'uid', 'i']
    with polkit.user('bob').call(NAME, PATH, AUTHORITY, 'CheckAuthorization', '(sa{sv})sa{ss}us', *subject,
                                 str(USERS['alice']), OWN, '0', '0', '') as call:
        assert 'Only trusted callers' in call.answer()


# pkcheck(1): 0 allowed, 1 not, 2 somebody would have to be asked, 3 dismissed
@pytest.mark.parametrize(('action', 'ask', 'says_yes', 'status'), [
    (OWN, '', True, 0), (OTHER, '', True, 2), (OTHER, '-u', True, 0), (OTHER, '-u', False, 3),
])
async def test_a_users_program_as_its_own_tool_sees_it(polkit: Polkit, action: str, ask: str, says_yes: bool,
                                                       status: int) -> None:
    """It is there, with its agent, before it asks; and is the same process when it does."""
    command = f'exec pkcheck {ask} --action-id {action} --process $$'
    with polkit.user('alice').held('sh', '-c', command) as program:
        async with polkit.agent(program.pid, says_yes=says_yes) as agent:
            done = await asyncio.to_thread(program.go)
    assert (done[0], agent.asked) == (status, [action] if ask else []), done
    await asyncio.get_running_loop().shutdown_default_executor()


def test_a_user_owns_no_name_and_calls_no_service_without_a_policy(polkit: Polkit) -> None:
    bus = 'org.freedesktop.DBus'
    alice = polkit.user('alice')
    with alice.call(bus, '/org/freedesktop/DBus', bus, 'RequestName', 'su', 'org.ckptd1', '4') as call:
        words = call.answer()
    assert isinstance(words, str)
    assert 'not allowed to own' in words or 'denied' in words.lower() or 'refused' in words.lower(), words


async def test_how_long_a_check_takes(polkit: Polkit, alices: int) -> None:
    """By the clock, for information; bounded only so that a hang is noticed."""
    loop = asyncio.get_running_loop()
    async with await connect(polkit.bus.address) as client:
        times = []
        for _ in range(20):
            begin = loop.time()
            await check(client, alices, OWN)
            times.append(loop.time() - begin)
    print(f'a check takes {min(times) * 1e3:.1f} to {max(times) * 1e3:.1f} ms')
    assert min(times) < 2
