# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker's socket whose other end stays open when the daemon dies."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest

from ckptd.engine.channel import Channel
from ckptd.engine.messages import Caller, Follow, JobRequest, Log, Start, Thaw, ToWorker
from ckptd.errors import Cancelled
from ckptd.kernel.pidfd import wait_dead
from ckptd.kernel.witness import Witness

START = Start(JobRequest('scan', 'pid:1', Caller(0, 0), '/nowhere', '/nowhere'))


@dataclass
class Ends:
    """channel: after its Start. witness: whose end is the daemon's."""
    channel: Channel
    socket: socket.socket
    witness: Witness

    def say(self, message: ToWorker, *fds: int) -> None:
        socket.send_fds(self.socket, [msgspec.msgpack.encode(message)], fds)

    def die(self) -> None:
        pidfd = os.dup(self.witness.pidfd)
        self.witness.close()
        assert wait_dead(pidfd, 10)     # the interpreter is done with a thread before the kernel is
        os.close(pidfd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = Ends(Channel(theirs.detach()), ours, Witness())
    try:
        if made.witness.pidfd < 0:
            pytest.skip('needs PIDFD_THREAD (Linux 6.9)')
        made.say(Follow(), made.witness.pidfd)
        made.say(START)
        assert made.channel.wait_start() == (START, [])
        yield made
    finally:
        made.channel.close()
        made.witness.close()
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


def say_much(channel: Channel) -> None:
    for _ in range(1000):
        channel.send(Log(20, 'x' * 10_000))
