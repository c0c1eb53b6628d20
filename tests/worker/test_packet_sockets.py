# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packet sockets: what sock_diag(7) says of them, refusals, losses, and images that lie."""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import CkptError
from ckptd.image.records import SavedFile
from ckptd.kernel.packet import PacketSocket, packet_sockets
from ckptd.objects.files.packet import PacketMembership, PacketOption, RawPacketSocket
from ckptd.objects.files.socket_filter import NO_FILTER
from tests.lib.altered import rewrite
from tests.lib.brood import Brood
from tests.lib.victim import Victim
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, as_user, place_of
from tests.worker.test_inet_sockets import killed, reaped, refusals, restored, sockets_of, warned
from tests.worker.test_restore_checks import checked

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

PACKET, RAW, SOL_PACKET = socket.AF_PACKET, socket.SOCK_RAW, 263


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).make()


@pytest.fixture
def brood() -> Iterator[Brood]:
    with Brood() as running:
        yield running


def shown(pid: int) -> dict[int, PacketSocket]:
    """The packet sockets of a process, by fd, without their inodes."""
    known = packet_sockets()
    with sockets_of(pid) as found:
        return {fd: known[os.fstat(one.fileno()).st_ino]._replace(inode=0) for fd, one in found.items()
                if one.family == PACKET}


def test_the_kernel_shows_the_same(victim: Callable[..., Victim], place: Place) -> None:
    """Protocols, interfaces, memberships in their order with how often they were joined, and groups."""
    running = victim('packet_sockets')
    before = shown(running.pid)
    assert [sorted(group.joins for group in one.memberships) for one in before.values() if one.memberships] == [[1, 2]]
    assert sum(one.fanout is not None for one in before.values()) == 2
    pid = restored(place, killed(running, place))
    with reaped(pid):
        assert shown(pid) == before


def ring() -> int:
    one = socket.socket(PACKET, RAW, 0)
    one.setsockopt(SOL_PACKET, 5, struct.pack('=4I', 4096, 4, 2048, 8))     # PACKET_RX_RING
    return one.detach()


def group_of_a_program() -> int:
    one = socket.socket(PACKET, RAW, 0)
    one.bind(('lo', 0x88b6))
    one.setsockopt(SOL_PACKET, 18, (6 | 0x2000) << 16)        # PACKET_FANOUT_CBPF with a free id
    return one.detach()


@pytest.mark.parametrize(('work', 'said'), [(ring, 'with a ring'), (group_of_a_program, 'that a program distributes')])
def test_what_cannot_be_read_is_refused(place: Place, brood: Brood, work: Callable[[], int], said: str) -> None:
    pid, fd = brood.ask(work)
    [row] = refusals(place, pid)
    assert row.resource == f'fd {fd}'
    assert said in row.reason


def test_unread_packets_are_a_warning(place: Place, brood: Brood) -> None:
    def receive() -> int:
        one = socket.socket(PACKET, RAW, 0)
        one.bind(('lo', 0x88b5))
        return one.detach()
    pid, _ = brood.ask(receive)
    with socket.socket(PACKET, RAW, 0) as sender:
        sender.bind(('lo', 0))
        sender.send(bytes(12) + struct.pack('>H', 0x88b5) + bytes(60))
    assert sum('has unread packets' in reason for reason in warned(place, pid)) == 1
    with sockets_of(pid) as found:
        [one] = [one for one in found.values() if one.family == PACKET]
        assert len(one.recv(100, socket.MSG_DONTWAIT)) == 74


def lie(image: Path, change: Callable[[RawPacketSocket], RawPacketSocket]) -> None:
    rewrite(image, SavedFile, lambda one: one if one.kind != 'packet' else replace(
        one, data=change(RawPacketSocket.decode(one.data)).encode()))


LIES: dict[str, Callable[[RawPacketSocket], RawPacketSocket]] = {
    'a type': lambda one: replace(one, type=0xFFFFFFFF),
    'an interface': lambda one: replace(one, interface='x' * 5000),
    'no such interface': lambda one: replace(one, interface='nowhere0'),
    'an option': lambda one: replace(one, packet_options=(PacketOption(5, 1),)),
    'a membership': lambda one: replace(one, memberships=(PacketMembership('lo', 1, b'', 0xFFFFFFFF),)),
    'a long address': lambda one: replace(one, memberships=(PacketMembership('lo', 0, bytes(99), 1),)),
    'a group': lambda one: replace(one, fanout=(0xFFFFFFFF,)),
}


def test_an_image_that_lies_is_refused(victim: Callable[..., Victim], place: Place) -> None:
    image = killed(victim('packet_sockets'), place)
    truth = {}
    lie(image, lambda one: truth.setdefault(len(truth), one))
    for what, change in LIES.items():
        each = iter(truth.values())
        lie(image, lambda _: change(next(each)))        # noqa: B023 - called at once
        assert [row for row in checked(place, image) if row.severity == 'refusal'], what
    with DirectWorker() as worker, pytest.raises(CkptError):
        worker.run(place.request(0, operation='restore', image=image.name))
    assert not place.freezes


def test_a_user_is_refused() -> None:
    """The kernel gives none to a user, whose image has some."""
    def work() -> None:
        place = Place(Path.cwd()).make()
        with Victim('inet_sockets', directory=place.path / 'victim') as running:
            image = place.checkpoint(running.pid, forked=True, freeze='ptrace')
            rewrite(image, SavedFile, lambda one: one if one.kind != 'netlink' and one.kind != 'udp' else replace(
                one, kind='packet', data=fresh.encode()))
            with DirectWorker(forked=True) as worker:
                result = worker.run(place.request(0, operation='check-restore', image=image.name))
            rows = [row for row in result['refusals'] if 'a packet socket cannot be made' in row['reason']]
            assert rows
            assert {(row['errno'], row['hint']) for row in rows} == {('EPERM', 'restore it as root')}
            running.finish()

    fresh = RawPacketSocket(int(RAW), ORDINARY_UID, ORDINARY_UID, 0, '', 0, (), (), (), (), NO_FILTER)
    with place_of(ORDINARY_UID) as home:
        as_user(ORDINARY_UID, home, work)
