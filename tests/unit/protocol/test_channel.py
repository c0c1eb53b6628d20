# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker's socket: whose other end stays open when the daemon dies, and that is to carry very much."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from ckptd.errors import Cancelled, Finding, LimitsExceeded, Refused
from ckptd.kernel.liveness import Liveness
from ckptd.kernel.pidfd import wait_dead
from ckptd.protocol.channel import Channel
from ckptd.protocol.messages import (
    MAX_MESSAGE,
    MAX_ROWS,
    MAX_TEXT,
    Failed,
    Finished,
    Follow,
    Log,
    Start,
    Thaw,
    ToWorker,
)
from ckptd.protocol.requests import Caller, ScanRequest
from ckptd.target import ProcessTarget

START = Start(ScanRequest(caller=Caller(0, 0), spool='/nowhere', runtime='/nowhere', target=ProcessTarget(1)))


@dataclass
class Ends:
    """channel: after its Start. witness: whose end is the daemon's."""
    channel: Channel
    socket: socket.socket
    liveness: Liveness

    def say(self, message: ToWorker, *fds: int) -> None:
        socket.send_fds(self.socket, [msgspec.msgpack.encode(message)], fds)

    def die(self) -> None:
        pidfd = os.dup(self.liveness.pidfd)
        self.liveness.close()
        assert wait_dead(pidfd, 10)     # the interpreter is done with a thread before the kernel is
        os.close(pidfd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = Ends(Channel(theirs.detach()), ours, Liveness())
    try:
        if made.liveness.pidfd < 0:
            pytest.skip('needs PIDFD_THREAD (Linux 6.9)')
        made.say(Follow(), made.liveness.pidfd)
        made.say(START)
        assert made.channel.wait_start() == (START, [])
        yield made
    finally:
        made.channel.close()
        made.liveness.close()
        ours.close()


def test_what_was_said_before_comes_first(ends: Ends) -> None:
    ends.say(Thaw())
    ends.die()
    assert ends.channel.receive() == (Thaw(), [])
    assert ends.channel.receive() == (None, [])
    ends.channel.wait_thaw()


def test_a_check(ends: Ends) -> None:
    ends.channel.check()
    ends.die()
    with pytest.raises(Cancelled):
        ends.channel.check()


def test_a_wait_for_somebody_else(ends: Ends) -> None:
    reader, writer = os.pipe()
    ends.die()
    with pytest.raises(Cancelled):
        ends.channel.wait_readable(reader)
    os.close(reader)
    os.close(writer)


def test_nobody_reads_any_more(ends: Ends) -> None:
    ends.die()
    with pytest.raises(Cancelled, match='the daemon is gone'):
        say_much(ends.channel)


def test_rows_of_any_size() -> None:
    """Each comes, and what of it has no room in a packet is left out."""
    rows: list[Any] = ['y' * 500_000, {'tid': 7, 'fds': [f'{fd} {"z" * 5000}' for fd in range(500)]},
                       *({'comm': '\udcff' * 90, 'fds': ['0 /dev/null']} for _ in range(2000))]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, ThreadPoolExecutor(1) as pool:
        channel = Channel(theirs.detach())
        sending = pool.submit(channel.finish, 'rows', rows, {'tasks': 7})
        parts = []
        while not parts or parts[-1].more:
            parts.append(msgspec.msgpack.decode(ours.recv(MAX_MESSAGE), type=Finished))
        sending.result()
        channel.close()
    assert [part.result.get('tasks') for part in parts] == [7] + [None] * (len(parts) - 1)
    text, long, *others = [row for part in parts for row in part.result['rows']]
    assert (len(text), text[-4:]) == (MAX_TEXT, 'y...')
    assert long['tid'] == 7
    assert 20 < len(long['fds']) < 500
    assert {len(fd) for fd in long['fds']} == {MAX_TEXT}
    assert others == [{'comm': '\\xff' * 90, 'fds': ['0 /dev/null']}] * 2000


def test_a_result_that_nobody_could_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('ckptd.protocol.channel.MAX_RESULT', 200_000)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        channel = Channel(theirs.detach())
        with pytest.raises(LimitsExceeded, match='200,000 bytes'):
            channel.finish('rows', ['z' * 1000] * 1000)
        assert msgspec.msgpack.decode(ours.recv(MAX_MESSAGE), type=Finished).more
        channel.close()


def test_a_failure_of_any_size() -> None:
    """With as many of its refusals as a packet has room for."""
    refusals = [Finding(number, 'x' * 15, f'fd {number}', 'ENOTSUP', '\udcff' * 9000, 'h' * 9000)
                for number in range(1000)]
    error = Refused.because(refusals)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        channel = Channel(theirs.detach())
        channel.send(Failed.of(error))
        heard = msgspec.msgpack.decode(ours.recv(MAX_MESSAGE), type=Failed).error()
        channel.close()
    assert type(heard) is Refused
    assert 10 < len(heard.refusals) < MAX_ROWS
    assert [row.pid for row in heard.refusals] == list(range(len(heard.refusals)))
    assert len(heard.refusals[0].hint) == MAX_TEXT


def say_much(channel: Channel) -> None:
    for _ in range(1000):
        channel.send(Log(20, 'x' * 10_000))
