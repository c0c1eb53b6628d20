# SPDX-License-Identifier: LGPL-2.1-or-later
"""TCP connections within a tree in the states of closing: fin-wait-1, closing, last-ack, each with bytes that nobody
has read. A filter of the other end drops each FIN, until the victim goes on. Kernels let only root attach such a filter
to a TCP socket, so the victim of a user has none of them."""

import ctypes
import os
import socket
import struct

from victim import ready, wait_for_go

TCP, SOL, SO_ATTACH_FILTER, SO_DETACH_FILTER = socket.IPPROTO_TCP, socket.SOL_SOCKET, 26, 27
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 5, 8, 9, 11
# load the flags of the TCP header; if FIN is among them drop the packet, else take all of it
NO_FIN = b''.join(struct.pack('=HBBI', *one) for one in (
    (0x30, 0, 0, 13), (0x45, 0, 1, 1), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)))


def drop_fins(sock: socket.socket) -> None:
    code = ctypes.create_string_buffer(NO_FIN, len(NO_FIN))
    sock.setsockopt(SOL, SO_ATTACH_FILTER, struct.pack('=HxxxxxxQ', len(NO_FIN) // 8, ctypes.addressof(code)))


def state(sock: socket.socket) -> int:
    return int(sock.getsockopt(TCP, socket.TCP_INFO, 1)[0])


def wait_for(first: tuple[socket.socket, int], second: tuple[socket.socket, int]) -> None:
    while [state(first[0]), state(second[0])] != [first[1], second[1]]:
        pass


def pair(server: socket.socket) -> tuple[socket.socket, socket.socket]:
    one = socket.create_connection(server.getsockname())
    other = server.accept()[0]
    one.sendall(b'one')
    other.sendall(b'other')
    return one, other


class Closing:

    def __init__(self, server: socket.socket) -> None:
        # the FIN of the first one is lost
        self.lost = pair(server)
        drop_fins(self.lost[1])
        self.lost[0].shutdown(socket.SHUT_WR)
        wait_for((self.lost[0], FIN_WAIT1), (self.lost[1], ESTABLISHED))
        # both have sent one, and that of the first one is lost
        self.crossed = pair(server)
        drop_fins(self.crossed[1])
        self.crossed[0].shutdown(socket.SHUT_WR)
        self.crossed[1].shutdown(socket.SHUT_WR)
        wait_for((self.crossed[0], CLOSING), (self.crossed[1], FIN_WAIT2))
        # that of the second one, the answer to the other, is lost
        self.last = pair(server)
        self.last[0].shutdown(socket.SHUT_WR)
        wait_for((self.last[0], FIN_WAIT2), (self.last[1], CLOSE_WAIT))
        drop_fins(self.last[0])
        self.last[1].shutdown(socket.SHUT_WR)
        wait_for((self.last[0], FIN_WAIT2), (self.last[1], LAST_ACK))
        self.before = self.look()

    def look(self) -> list[object]:
        return [(state(one), one.getsockname(), one.getpeername())
                for ends in (self.lost, self.crossed, self.last) for one in ends]

    def check(self) -> None:
        now = self.look()
        assert now == self.before, [pair for pair in zip(now, self.before, strict=True) if pair[0] != pair[1]]
        for one in (self.lost[1], self.crossed[1], self.last[0]):
            one.setsockopt(SOL, SO_DETACH_FILTER, 0)
        self.lost[1].shutdown(socket.SHUT_WR)
        for one, other in (self.lost, self.crossed, self.last):
            for end, data in ((one, b'other'), (other, b'one')):
                end.settimeout(20)      # the FIN is sent again, later and later
                found = b''
                while piece := end.recv(100):
                    found += piece
                assert found == data


def main() -> None:
    with socket.create_server(('127.0.0.1', 0)) as server:
        closing = Closing(server) if os.geteuid() == 0 else None
    ready()
    wait_for_go()
    if closing:
        closing.check()


main()
