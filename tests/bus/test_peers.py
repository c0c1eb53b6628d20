# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who calls: credentials from the bus and the kernel, remembered until the caller leaves."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.bus import peers
from ckptd.bus.connection import DRIVER, Connection
from ckptd.bus.export import Audience, Viewer
from ckptd.bus.peers import Peers
from ckptd.errors import LimitsExceeded, PermissionDenied
from ckptd.kernel.status import read_status
from tests.bus.conftest import Service
from tests.bus.raw import open_fds, same_fds
from tests.bus.sample import INTERFACE, NAME, ROOT

# a client that is another process and, if told so, another user: it says its unique name, and leaves on end-of-file
CLIENT = '''
import asyncio, concurrent.futures.thread, os, sys
sys.path.insert(0, sys.argv[2])
from ckptd.bus.connection import Connection
if sys.argv[3] != '-':
    os.setgroups([7, 9])
    os.setgid(int(sys.argv[3]))
    os.setuid(int(sys.argv[3]))
async def main():
    async with await Connection.open(sys.argv[1]) as connection:
        print(connection.unique_name, flush=True)
        await asyncio.to_thread(sys.stdin.read)
asyncio.run(main())
'''


async def start(address: str, uid: str = '-') -> tuple['asyncio.subprocess.Process', str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, '-c', CLIENT, address, str(Path(__file__).parents[2]), uid, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode().strip()


def open_to_all(address: str) -> None:
    socket = Path(address.removeprefix('unix:path=').partition(',')[0])
    socket.parent.chmod(0o711)
    socket.chmod(0o666)


async def end(process: 'asyncio.subprocess.Process') -> None:
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


async def test_a_handler_learns_who_calls(service: Service) -> None:
    async with service.client() as client:
        uid, pid, capabilities = await client.call(NAME, ROOT, INTERFACE, 'WhoAmI')
    assert (uid, pid, int(capabilities, 16)) == (os.getuid(), os.getpid(), read_status(os.getpid()).cap_eff)


async def test_another_process(service: Service) -> None:
    process, name = await start(service.address)
    caller = await service.router.peers.caller(name)
    await end(process)
    assert (caller.uid, caller.gid, caller.pid) == (os.getuid(), os.getgid(), process.pid)
    assert set(os.getgroups()) <= set(caller.groups) | {os.getgid()}


@pytest.mark.needs('root')
async def test_another_user(service: Service) -> None:
    open_to_all(service.address)
    process, name = await start(service.address, '1')
    caller = await service.router.peers.caller(name)
    await end(process)
    assert (caller.uid, caller.gid, caller.capabilities) == (1, 1, 0)
    assert {7, 9} <= set(caller.groups)


async def test_a_caller_that_has_left_is_refused_and_forgotten(service: Service) -> None:
    before = open_fds()
    process, name = await start(service.address)
    gone = asyncio.Event()
    await service.router.peers.when_gone(name, gone.set)
    assert len(open_fds() - before) >= 1        # its pidfd
    await end(process)
    async with asyncio.timeout(5):
        await gone.wait()
    await same_fds(before)
    assert not service.router.peers._known
    assert not service.connection._subscriptions
    with pytest.raises(PermissionDenied):
        await service.router.peers.caller(name)
    at_once = asyncio.Event()
    await service.router.peers.when_gone(name, at_once.set)
    assert at_once.is_set()


@pytest.mark.needs('root')
async def test_who_has_the_most_connections_loses_one(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not who has called first, nor who calls now."""
    monkeypatch.setattr(peers, 'MAX_PEERS', 4)
    open_to_all(service.address)
    other, name = await start(service.address, '1')
    assert (await service.router.peers.caller(name)).uid == 1
    mine = [await Connection.open(service.address) for _ in range(5)]
    for connection in mine:
        await service.router.peers.caller(connection.unique_name)
    assert list(service.router.peers._known) == [name, *(one.unique_name for one in mine[2:])]
    for connection in mine:
        await connection.close()
    await end(other)


@pytest.mark.needs('root')
async def test_what_is_seen_is_asked_once_and_again_when_it_changes(service: Service) -> None:
    open_to_all(service.address)
    other, name = await start(service.address, '1')
    answers, asked = [True, False], 0

    async def ask(sender: str, uid: int) -> bool:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return answers[asked - 1]

    known, roots = service.router.peers, Audience(0)
    assert [one.all for one in await asyncio.gather(*(known.viewer(name, ask) for _ in range(8)))] == [True] * 8
    assert asked == 1
    assert known.listeners(roots) == [name]
    assert known.forget_views() == [name]      # whatever the answer was
    assert known.listeners(roots) == []
    assert not (await known.viewer(name, ask)).all
    assert asked == 2
    await end(other)


@pytest.mark.needs('root')
async def test_an_answer_that_is_of_yesterday_when_it_comes(service: Service) -> None:
    """Something has changed while it was asked for: asked again, and never heard with what does not hold any more."""
    open_to_all(service.address)
    other, name = await start(service.address, '1')
    known, answers = service.router.peers, [True, False]

    async def ask(sender: str, uid: int) -> bool:
        if len(answers) == 2:
            known.forget_views()
        return answers.pop(0)

    assert not (await known.viewer(name, ask)).all
    assert answers == []
    assert known.listeners(Audience(0)) == []
    assert known.forget_views() == [name]
    await end(other)


@pytest.mark.needs('root')
async def test_an_answer_that_there_is_not_for_now(service: Service) -> None:
    """What is one's own is seen meanwhile, and it is asked again."""
    open_to_all(service.address)
    other, name = await start(service.address, '1')
    known, asked = service.router.peers, 0

    async def ask(sender: str, uid: int) -> bool:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise LimitsExceeded('too many questions')
        return uid == 1

    assert [await known.viewer(name, ask) for _ in range(3)] == [Viewer(1), Viewer(1, True), Viewer(1, True)]
    assert asked == 2
    await end(other)


@pytest.mark.needs('root')
async def test_one_user_is_remembered_so_often(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, 'MAX_OF_USER', 2)
    open_to_all(service.address)
    others = [await start(service.address, '1') for _ in range(3)]
    for _, name in others:
        await service.router.peers.caller(name)
    mine = [await Connection.open(service.address) for _ in range(4)]
    for connection in mine:
        await service.router.peers.caller(connection.unique_name)       # root's are as many as there is room for
    assert service.router.peers.senders == [name for _, name in others[1:]] + [one.unique_name for one in mine]
    for connection in mine:
        await connection.close()
    for process, _ in others:
        await end(process)


async def test_a_mistake_in_one_callback_costs_the_others_nothing(service: Service) -> None:
    other, gone = await Connection.open(service.address), asyncio.Event()

    def mistake() -> None:
        raise RuntimeError('a mistake of ours')

    await service.router.peers.when_gone(other.unique_name, mistake)
    await service.router.peers.when_gone(other.unique_name, gone.set)
    await other.close()
    async with asyncio.timeout(5):
        await gone.wait()


@pytest.mark.parametrize('after', ['_credentials', '_fill'])
async def test_a_caller_that_leaves_while_it_is_asked_about(service: Service, monkeypatch: pytest.MonkeyPatch,
                                                            after: str) -> None:
    """The watch is there before the question, so the caller is not remembered for ever."""
    other = await Connection.open(service.address)
    step = getattr(Peers, after)

    async def leave_then(self: Peers, peer: peers.Peer) -> object:
        result = await step(self, peer)
        if other.connected:
            await other.close()
            await service.connection.call(DRIVER, '/org/freedesktop/DBus', DRIVER, 'GetId')     # a round trip later
        return result

    monkeypatch.setattr(Peers, after, leave_then)
    with pytest.raises(PermissionDenied):
        await service.router.peers.caller(other.unique_name)
    assert not service.router.peers._known
    assert not service.connection._subscriptions


def test_a_pid_that_is_another_ones_now_is_not_believed() -> None:
    process = subprocess.Popen(['true'])
    pidfd = os.pidfd_open(process.pid)
    process.wait()
    peer = peers.Peer(':1.1', os.getuid(), pid=os.getpid(), pidfd=pidfd)
    assert peer.status() is None
    peer.close()


def test_a_process_that_became_another_user_is_not_believed() -> None:
    peer = peers.Peer(':1.1', os.getuid() + 1, pid=os.getpid(), pidfd=os.pidfd_open(os.getpid()))
    assert peer.status() is None
    peer.close()


async def test_few_peers_are_remembered(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, 'MAX_PEERS', 3)
    before, known = open_fds(), Peers(service.connection)
    others = [await Connection.open(service.address) for _ in range(6)]
    for other in others:
        assert (await known.caller(other.unique_name)).pid == os.getpid()
    assert len(known._known) == 3
    assert len(service.connection._subscriptions) == 3
    for other in others:
        await other.close()
    known.close()
    assert open_fds() == before


async def test_many_callers_leave_no_match_rule_behind(service: Service) -> None:
    """A bus allows some 512 rules."""
    for _ in range(600):
        async with await Connection.open(service.address) as other:
            await service.router.peers.caller(other.unique_name)
    async with service.client() as client:
        assert (await client.call(NAME, ROOT, INTERFACE, 'WhoAmI'))[0] == os.getuid()
