# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd beside a real polkitd: what two users get at of each other's trees, jobs and images, in every way there is."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckptd.bus.names import BUS_NAME, IMAGE, JOB, MANAGER, ROOT, image_path, job_path
from tests.jobs.test_spool import write_image
from tests.lib.bus import ROOT as SOURCE
from tests.lib.bus import Served
from tests.lib.polkit import Polkit
from tests.lib.systembus import USERS
from tests.programs.conftest import await_that

PROPERTIES, INTROSPECTABLE = 'org.freedesktop.DBus.Properties', 'org.freedesktop.DBus.Introspectable'
ASKED = 'that a person must give'
NOT_THERE = 'no object at'


def rule(action: str, user: str, result: str) -> str:
    return f"""polkit.addRule(function(action, subject) {{
        if (action.id == "org.ckptd1.{action}" && subject.user == "{user}") return polkit.Result.{result};
    }});"""


@pytest.fixture
def images(tmp_path: Path) -> tuple[str, str]:
    """alice's and bob's, there before the daemon is."""
    spool = tmp_path / 'spool'
    spool.mkdir(mode=0o700)
    return write_image(spool, USERS['alice']), write_image(spool, USERS['bob'])


@pytest.fixture
def daemon(polkit: Polkit, images: tuple[str, str], tmp_path: Path) -> Iterator[Served]:
    with Served(polkit.bus.address, tmp_path, tmp_path / 'spool') as running:
        yield running


def ask(polkit: Polkit, user: str, interface: str, member: str, *args: str, path: str = ROOT,
        interactive: bool = False) -> Any:
    """The values, None, or the words of the error."""
    with polkit.user(user).call(BUS_NAME, path, interface, member, *args, interactive=interactive) as call:
        return call.answer()


def manager(polkit: Polkit, user: str, member: str, *args: str) -> Any:
    return ask(polkit, user, MANAGER, member, *args)


# ---------------------------------------------------------------- trees

@pytest.mark.needs('cgroup2', 'ptrace')
def test_ones_own_tree_and_that_of_another(polkit: Polkit, daemon: Served) -> None:
    with polkit.user('alice').process() as alices, polkit.user('bob').process() as bobs:
        assert manager(polkit, 'alice', 'Freeze', 'sa{sv}', f'pid:{alices}', '0') == [1]
        assert manager(polkit, 'bob', 'ListJobs') == [[]]
        assert ASKED in manager(polkit, 'bob', 'Thaw', 'sa{sv}', f'pid:{alices}', '0')
        assert manager(polkit, 'alice', 'Thaw', 'sa{sv}', f'pid:{alices}', '0') is None
        for method in ('Freeze', 'Checkpoint'):
            assert ASKED in manager(polkit, 'alice', method, 'sa{sv}', f'pid:{bobs}', '0')
        assert ASKED in manager(polkit, 'alice', 'Inhibit', 'ssa{sv}', 'me', 'why', '1', 'target', 's', f'pid:{bobs}')
        refusals = manager(polkit, 'alice', 'Check', 'sa{sv}', f'pid:{bobs}', '0')
        assert 'EPERM' in json.dumps(refusals)
        assert f'/home/{bobs}' not in json.dumps(refusals)
    assert 'refused method=Thaw uid=61002' in daemon.log
    assert 'allowed method=Freeze uid=61001' in daemon.log


@pytest.mark.needs('cgroup2', 'ptrace')
def test_what_rules_say(polkit: Polkit, daemon: Served) -> None:
    polkit.set_rules(rule('freeze', 'alice', 'YES') + rule('freeze-own', 'alice', 'NO'))
    with polkit.user('alice').process() as alices, polkit.user('bob').process() as bobs:
        answer = manager(polkit, 'alice', 'Freeze', 'sa{sv}', f'pid:{alices}', '0')
        assert 'may not freeze' in answer
        assert 'org.ckptd1.freeze-own' in answer
        assert manager(polkit, 'alice', 'Freeze', 'sa{sv}', f'pid:{bobs}', '0') == [1]
        assert manager(polkit, 'alice', 'Thaw', 'sa{sv}', f'pid:{bobs}', '0') is None


@pytest.mark.needs('cgroup2', 'ptrace')
def test_whether_another_has_frozen_something(polkit: Polkit, daemon: Served) -> None:
    """It is told to those who may see what is others', or may thaw it."""
    def thaw(user: str, *pids: int) -> list[Any]:
        answers = [manager(polkit, user, 'Thaw', 'sa{sv}', f'pid:{pid}', '0') for pid in pids]
        return [answer and answer.replace(f'pid:{pid}', 'pid:N') for pid, answer in zip(pids, answers, strict=True)]

    with polkit.user('bob').process() as frozen, polkit.user('bob').process() as other:
        assert manager(polkit, 'bob', 'Freeze', 'sa{sv}', f'pid:{frozen}', '0') == [1]
        for result, words in (('AUTH_ADMIN', ASKED), ('NO', 'is not frozen by ckptd')):
            polkit.set_rules(rule('freeze', 'alice', result) + rule('manage-images', 'alice', 'NO'))
            one, same = thaw('alice', frozen, other)
            assert words in one
            assert one == same
        assert 'refused method=Thaw' in daemon.log
        polkit.set_rules(rule('freeze', 'alice', 'NO') + rule('manage-images', 'alice', 'YES'))
        owner = f'which belongs to uid {USERS["bob"]}'
        # ckptd hears by a signal, in its own time, that alice may see it
        await_that('alice sees what is bob\'s', lambda: owner in thaw('alice', frozen)[0])
        assert 'is not frozen by ckptd' in thaw('alice', other)[0]
        polkit.set_rules(rule('freeze', 'alice', 'YES'))
        one, same = thaw('alice', frozen, other)
        assert one is None
        assert 'is not frozen by ckptd' in same


@pytest.mark.needs('cgroup2', 'ptrace')
async def test_what_is_frozen_while_a_person_is_asked_stays_so(polkit: Polkit, daemon: Served) -> None:
    """Whoever allows it has not been told of that."""
    with polkit.user('bob').process() as bobs, \
            polkit.user('alice').call(BUS_NAME, ROOT, MANAGER, 'Thaw', 'sa{sv}', f'pid:{bobs}', '0') as call:
        async with polkit.agent(call.pid, says_yes=True) as agent:
            agent.meanwhile = partial(manager, polkit, 'bob', 'Freeze', 'sa{sv}', f'pid:{bobs}', '0')
            answer = await asyncio.to_thread(call.answer)
        assert agent.asked == ['org.ckptd1.freeze']
        assert 'is not frozen by ckptd' in answer
        assert await asyncio.to_thread(manager, polkit, 'bob', 'Thaw', 'sa{sv}', f'pid:{bobs}', '0') is None
    await asyncio.get_running_loop().shutdown_default_executor()


@pytest.mark.needs('cgroup2', 'ptrace')
@pytest.mark.parametrize('says_yes', [True, False])
async def test_a_person_is_asked(polkit: Polkit, daemon: Served, says_yes: bool) -> None:
    with polkit.user('bob').process() as bobs, \
            polkit.user('alice').call(BUS_NAME, ROOT, MANAGER, 'Freeze', 'sa{sv}', f'pid:{bobs}', '0') as call:
        async with polkit.agent(call.pid, says_yes=says_yes) as agent:
            answer = await asyncio.to_thread(call.answer)
        assert agent.asked == ['org.ckptd1.freeze']
        if says_yes:
            assert answer == [1]
            assert manager(polkit, 'alice', 'Thaw', 'sa{sv}', f'pid:{bobs}', '0') is None
        else:
            assert 'the question was dismissed' in answer
    await asyncio.get_running_loop().shutdown_default_executor()


# calls of one process on several connections, as many as one may have at a time; the answers are not waited for
FLOOD = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[2])
from ckptd.bus import wire
from ckptd.bus.connection import Connection
from ckptd.bus.message import ALLOW_INTERACTIVE
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[3]))
async def main():
    for _ in range(5):
        connection = await Connection.open(sys.argv[1])
        for _ in range(32):
            connection.send(wire.make_call(BUS_NAME, ROOT, MANAGER, 'Freeze', 'sa{sv}', [sys.argv[4], {}],
                                           ALLOW_INTERACTIVE))
        await connection.drain()
    await asyncio.Event().wait()
print(flush=True)
sys.stdin.readline()
asyncio.run(main())
"""


@contextmanager
def flood(polkit: Polkit, user: str, target: str) -> Iterator['subprocess.Popen[str]']:
    """A program of this user's that calls when it is told to."""
    with subprocess.Popen([sys.executable, '-c', FLOOD, polkit.bus.address, str(SOURCE), str(USERS[user]), target],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == '\n'
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.needs('cgroup2', 'ptrace')
async def test_whose_agent_does_not_answer_holds_up_himself_alone(polkit: Polkit, daemon: Served) -> None:
    """160 questions at a time would be more than the replies that dbus-daemon lets ckptd wait for."""
    with polkit.user('carol').process() as carols, polkit.user('bob').process() as bobs, \
            flood(polkit, 'alice', f'pid:{carols}') as calls:
        assert calls.stdin is not None
        async with polkit.agent(calls.pid, says_yes=None) as agent:
            calls.stdin.write('go\n')
            calls.stdin.flush()
            await agent.until(asked=2)
            for method, answer in (('Freeze', [1]), ('Thaw', None)):
                assert await asyncio.to_thread(ask, polkit, 'bob', MANAGER, method, 'sa{sv}', f'pid:{bobs}', '0',
                                               interactive=True) == answer
            with polkit.user('bob').call(BUS_NAME, ROOT, MANAGER, 'Freeze', 'sa{sv}', f'pid:{carols}', '0') as call:
                async with polkit.agent(call.pid, says_yes=False) as bobs_agent:
                    assert 'the question was dismissed' in await asyncio.to_thread(call.answer)
                assert bobs_agent.asked == ['org.ckptd1.freeze']
            assert agent.asked == ['org.ckptd1.freeze'] * 2
            calls.kill()
            await agent.until(asked=2, cancelled=2)
    await asyncio.get_running_loop().shutdown_default_executor()


@pytest.mark.needs('cgroup2', 'ptrace')
def test_what_an_administrator_allowed_belongs_to_root(polkit: Polkit, daemon: Served) -> None:
    """Or who was let in once would have it for ever."""
    polkit.set_rules(rule('checkpoint', 'alice', 'YES'))
    with polkit.user('bob').process() as bobs:
        [job] = manager(polkit, 'alice', 'Checkpoint', 'sa{sv}', f'pid:{bobs}', '1', 'detach', 'b', 'true')
        until_over(polkit, 'alice', job)
        [shown] = ask(polkit, 'alice', PROPERTIES, 'GetAll', 's', JOB, path=job)
        assert shown['State']['data'] == 'done', shown
        assert shown['StartedByUID']['data'] == USERS['alice']
        image = shown['Image']['data']
        assert NOT_THERE in ask(polkit, 'bob', PROPERTIES, 'GetAll', 's', JOB, path=job)
    for user in ('alice', 'bob'):
        assert ASKED in manager(polkit, user, 'VerifyImage', 's', image)
        assert image not in json.dumps(manager(polkit, user, 'ListImages'))
    [owner] = ask_as_root(daemon, image_path(image), IMAGE, 'Owner')
    assert owner == 0


def until_over(polkit: Polkit, user: str, job: str) -> None:
    while ask(polkit, user, PROPERTIES, 'Get', 'ss', JOB, 'State', path=job)[0]['data'] in ('queued', 'running'):
        pass


def ask_as_root(daemon: Served, path: str, interface: str, name: str) -> list[Any]:
    done = daemon.busctl('--json=short', 'get-property', BUS_NAME, path, interface, name)
    assert done.returncode == 0, done.stderr
    return [json.loads(done.stdout)['data']]


def confined(polkit: Polkit, user: str, *command: str) -> Any:
    """The answer to a call of busctl that has no_new_privs."""
    with polkit.user(user).held('setpriv', '--no-new-privs', 'busctl', f'--address={polkit.bus.address}',
                                '--json=short', 'call', BUS_NAME, ROOT, MANAGER, *command) as pending:
        return pending.answer()


@pytest.mark.needs('cgroup2', 'ptrace')
def test_who_may_leave_a_sandbox(polkit: Polkit, daemon: Served, images: tuple[str, str]) -> None:
    """What it then takes is what it takes from anybody: of others' trees that is another action."""
    mine, other = images
    with polkit.user('alice').process() as alices, polkit.user('bob').process() as bobs:
        for result, words in (('AUTH_ADMIN', ASKED), ('NO', 'org.ckptd1.leave-confinement: polkit does not allow it')):
            polkit.set_rules(rule('leave-confinement', 'alice', result) + rule('freeze', 'alice', 'YES'))
            for call in (('Freeze', 'sa{sv}', f'pid:{alices}', '0'), ('Freeze', 'sa{sv}', f'pid:{bobs}', '0'),
                         ('Restore', 'sa{sv}', mine, '0'), ('VerifyImage', 's', mine), ('VerifyImage', 's', other)):
                answer = confined(polkit, 'alice', *call)
                assert words in answer, call
                assert 'confined by no_new_privs' in answer
        polkit.set_rules(rule('leave-confinement', 'alice', 'YES'))
        assert confined(polkit, 'alice', 'Freeze', 'sa{sv}', f'pid:{alices}', '0') == [1]
        assert confined(polkit, 'alice', 'Thaw', 'sa{sv}', f'pid:{alices}', '0') is None
        assert 'tree.img' in str(confined(polkit, 'alice', 'VerifyImage', 's', mine))
        answer = confined(polkit, 'alice', 'Freeze', 'sa{sv}', f'pid:{bobs}', '0')
        assert 'org.ckptd1.freeze' in answer
        assert 'confined' not in answer
        assert ASKED in confined(polkit, 'bob', 'Freeze', 'sa{sv}', f'pid:{bobs}', '0')


@pytest.mark.needs('cgroup2', 'ptrace')
async def test_a_person_is_asked_each_time(polkit: Polkit, daemon: Served) -> None:
    """What is kept is kept for the whole session, and that has other sandboxes."""
    with polkit.user('alice').process() as target, confined_twice(polkit, f'pid:{target}') as process:
        async with polkit.agent(process.pid, says_yes=True) as agent:
            out, _ = await asyncio.to_thread(process.communicate, 'go\n', 60)
        assert out == '1\n1\n'
        assert agent.asked == ['org.ckptd1.leave-confinement'] * 4
    await asyncio.get_running_loop().shutdown_default_executor()


@contextmanager
def confined_twice(polkit: Polkit, target: str) -> Iterator['subprocess.Popen[str]']:
    """A program of alice's with no_new_privs that freezes and thaws the target twice, when it is told to."""
    with subprocess.Popen(['setpriv', '--no-new-privs', sys.executable, '-c', TWICE, polkit.bus.address, str(SOURCE),
                           str(USERS['alice']), target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                          ) as process:
        try:
            yield process
        finally:
            process.kill()


TWICE = """
import asyncio, concurrent.futures.thread, os, sys
sys.path.insert(0, sys.argv[2])
from ckptd.bus.client import connect
from ckptd.bus.message import ALLOW_INTERACTIVE
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[3]))
async def main():
    async with await connect(sys.argv[1]) as client:
        for _ in range(2):
            for method in ('Freeze', 'Thaw'):
                done = await client.call(BUS_NAME, ROOT, MANAGER, method, 'sa{sv}', sys.argv[4], {}, timeout=30,
                                         flags=ALLOW_INTERACTIVE)
                if method == 'Freeze':
                    print(done, flush=True)
sys.stdin.readline()
asyncio.run(main())
"""


# ---------------------------------------------------------------- images and jobs

def test_no_way_to_the_image_of_another(polkit: Polkit, daemon: Served, images: tuple[str, str]) -> None:
    mine, other = images
    missing = f'{other[:-4]}{int(other[-4:], 16) ^ 1:04x}'
    for result, words in (('AUTH_ADMIN', ASKED), ('NO', 'polkit does not allow it')):
        polkit.set_rules(rule('manage-images', 'alice', result) + rule('restore', 'alice', result))
        for method, args in (('GetImage', ['s']), ('VerifyImage', ['s']), ('RemoveImage', ['s']),
                             ('Restore', ['sa{sv}']), ('CheckRestore', ['sa{sv}'])):
            answers = [manager(polkit, 'alice', method, *args, image, *(['0'] if 'a{sv}' in args[0] else []))
                       for image in (other, missing)]
            assert words in answers[0], method
            assert answers[0] == answers[1].replace(missing, other), method
    path = image_path(other)
    for interface, method, args in (
            (IMAGE, 'NoSuchMethod', []), ('org.ckptd1.NoSuch', 'Tree', []), (IMAGE, 'Tree', ['s', 'too many']),
            (IMAGE, 'Tree', []), (IMAGE, 'Verify', []), (IMAGE, 'Remove', []), (IMAGE, 'Open', []),
            (IMAGE, 'Restore', ['a{sv}', '0']), (IMAGE, 'CheckRestore', ['a{sv}', '0']),
            (PROPERTIES, 'GetAll', ['s', IMAGE]), (PROPERTIES, 'Get', ['ss', IMAGE, 'Command']),
            (INTROSPECTABLE, 'Introspect', [])):
        answer = ask(polkit, 'alice', interface, method, *args, path=path)
        nowhere = ask(polkit, 'alice', interface, method, *args, path=f'{path}x')
        assert answer == nowhere.replace(f'{path}x', path), method
        assert NOT_THERE in answer
    seen = json.dumps([manager(polkit, 'alice', 'ListImages'),
                       ask(polkit, 'alice', 'org.freedesktop.DBus.ObjectManager', 'GetManagedObjects'),
                       ask(polkit, 'alice', INTROSPECTABLE, 'Introspect', path=f'{ROOT}/image')])
    assert (mine in seen, other in seen) == (True, False)
    assert ask(polkit, 'alice', PROPERTIES, 'Get', 'ss', MANAGER, 'Images') == [{'type': 'u', 'data': 1}]
    assert (daemon.spool / other).exists()
    assert manager(polkit, 'alice', 'RemoveImage', 's', mine) is None


@pytest.mark.parametrize('node', ['job', 'image'])
def test_that_somebody_has_something_is_nobodys_business(polkit: Polkit, daemon: Served, node: str) -> None:
    """carol has nothing: she finds the nodes that lead to everybody's, and nothing below."""
    path = f'{ROOT}/{node}'
    [xml] = ask(polkit, 'carol', INTROSPECTABLE, 'Introspect', path=path)
    assert '<node name' not in xml
    assert ask(polkit, 'carol', 'org.freedesktop.DBus.Peer', 'Ping', path=path) is None
    [xml] = ask(polkit, 'carol', INTROSPECTABLE, 'Introspect')
    assert f'<node name="{node}"' in xml


@pytest.mark.needs('cgroup2', 'ptrace')
def test_an_administrator_hears_of_all(polkit: Polkit, daemon: Served) -> None:
    """From when polkit says so until it does not any more, without a further call; and nobody else does."""
    with (listening(polkit, 'alice') as alice, listening(polkit, 'carol') as carol,
          polkit.user('bob').process() as bobs):
        def hears(allowed: bool) -> bool:
            assert manager(polkit, 'bob', 'Freeze', 'sa{sv}', f'pid:{bobs}', '0') == [1]
            assert manager(polkit, 'bob', 'Thaw', 'sa{sv}', f'pid:{bobs}', '0') is None
            assert carol.heard() == []
            return ('JobNew' in alice.heard()) == allowed

        for allowed in (False, True, False):
            # which ckptd hears of by a signal, in its own time
            polkit.set_rules(rule('manage-images', 'alice', 'YES' if allowed else 'NO'))
            await_that(f'alice hears: {allowed}', partial(hears, allowed))


@dataclass
class Listener:
    process: 'subprocess.Popen[str]'

    def heard(self) -> list[str]:
        """The signals of ckptd since the last time. Nothing is called."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write('heard\n')
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, 'the listener has died'
        return line.split()


LISTENER = """
import asyncio, concurrent.futures.thread, os, sys
sys.path.insert(0, sys.argv[2])
from ckptd.bus.connection import Connection, Match
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[3]))
async def main():
    async with await Connection.open(sys.argv[1]) as connection:
        heard = []
        await connection.subscribe(Match(path_namespace=ROOT), lambda message: heard.append(message.member))
        await connection.call(BUS_NAME, ROOT, MANAGER, 'ListJobs')
        while await asyncio.to_thread(sys.stdin.readline):
            await connection.call('org.freedesktop.DBus', '/org/freedesktop/DBus', 'org.freedesktop.DBus', 'GetId')
            print(*heard, flush=True)
            heard.clear()
asyncio.run(main())
"""


@contextmanager
def listening(polkit: Polkit, user: str) -> Iterator[Listener]:
    with subprocess.Popen([sys.executable, '-c', LISTENER, polkit.bus.address, str(SOURCE), str(USERS[user])],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Listener(process)
        finally:
            process.kill()


def test_an_administrator_sees_all(polkit: Polkit, daemon: Served, images: tuple[str, str]) -> None:
    polkit.set_rules(rule('manage-images', 'alice', 'YES'))
    _, other = images
    assert other in json.dumps(manager(polkit, 'alice', 'ListImages'))
    assert ask(polkit, 'alice', PROPERTIES, 'Get', 'ss', IMAGE, 'Owner', path=image_path(other)) == [
        {'type': 'u', 'data': USERS['bob']}]
    assert ASKED in manager(polkit, 'alice', 'Restore', 'sa{sv}', other, '0')       # which is another matter
    assert manager(polkit, 'alice', 'RemoveImage', 's', other) is None


@pytest.mark.needs('cgroup2', 'ptrace')
def test_no_way_to_the_job_of_another(polkit: Polkit, daemon: Served) -> None:
    with polkit.user('alice').process() as alices:
        [job] = manager(polkit, 'alice', 'Checkpoint', 'sa{sv}', f'pid:{alices}', '1', 'detach', 'b', 'true')
        assert job == job_path(1)
        assert NOT_THERE in ask(polkit, 'bob', JOB, 'Cancel', 'a{sv}', '0', path=job)
        assert NOT_THERE in ask(polkit, 'bob', PROPERTIES, 'GetAll', 's', JOB, path=job)
        assert manager(polkit, 'bob', 'ListJobs') == [[]]
        until_over(polkit, 'alice', job)


# ---------------------------------------------------------------- tasks that are more than their user


@pytest.mark.needs('cgroup2', 'ptrace')
def test_a_process_that_can_become_root(polkit: Polkit, daemon: Served, privileged: int) -> None:
    """Its saved uid is root's: it is not all alice's."""
    answer = manager(polkit, 'alice', 'Freeze', 'sa{sv}', f'pid:{privileged}', '0')
    assert ASKED in answer
    polkit.set_rules(rule('freeze', 'alice', 'NO'))
    answer = manager(polkit, 'alice', 'Freeze', 'sa{sv}', f'pid:{privileged}', '0')
    assert 'which belongs to uid 0' in answer


@pytest.mark.needs('cgroup2', 'ptrace')
def test_a_process_that_is_not_dumpable(polkit: Polkit, daemon: Served, undumpable: int) -> None:
    """polkit has nothing against it; the kernel has."""
    answer = manager(polkit, 'alice', 'Freeze', 'sa{sv}', f'pid:{undumpable}', '0')
    assert 'may not inspect this task' in answer
    assert 'EPERM' in answer or 'EACCES' in answer
    assert f'refused operation=freeze uid={USERS["alice"]}' in daemon.log
