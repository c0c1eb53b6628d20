# SPDX-License-Identifier: LGPL-2.1-or-later
"""A dbus-broker on a socket of its own, without systemd: this process is its controller.

dbus-broker listens where its controller tells it to, in peer-to-peer D-Bus (dbus-broker(1), --controller; the
method AddListener(o, h, v) takes a listening socket and a policy).
"""

import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

from ckptd.bus import wire
from ckptd.bus.message import MessageType
from ckptd.bus.wire import Variant
from tests.lib.bus import terminate

BATCH = 'bta(btbs)a(btssssuutt)a(btssssuutt)'
POLICY = f'(a(u({BATCH}))a(buu({BATCH}))a(ss)bs)'
EVERY_UID = 0xFFFFFFFF
NO_LIMIT = 0xFFFFFFFFFFFFFFFF


def allow_everything() -> Variant:
    """Connect, own, send and receive, for everybody."""
    transmit = [[True, 1, '', '', '', '', 0, 0, 0, NO_LIMIT]]
    batch = [True, 1, [[True, 1, True, '']], transmit, transmit]
    return Variant(POLICY, [[[EVERY_UID, batch]], [], [], False, 'user'])


def authenticate(sock: socket.socket) -> None:
    """SASL as a client, all of it at once; the bus answers OK and AGREE_UNIX_FD."""
    uid = str(os.getuid()).encode().hex()
    sock.sendall(b'\0AUTH EXTERNAL ' + uid.encode() + b'\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n')
    answer = b''
    while not answer.endswith(b'AGREE_UNIX_FD\r\n'):
        piece = sock.recv(1)
        assert piece, answer
        answer += piece


class Broker:
    """`address` is where it listens."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix='ckptd-broker-'))
        self.address = f'unix:path={self._home}/socket'
        self._process: subprocess.Popen[bytes] | None = None
        self._controller: socket.socket | None = None

    def __enter__(self) -> Self:
        self._home.chmod(0o711)
        mine, theirs = socket.socketpair()
        self._controller = mine
        with theirs, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f'{self._home}/socket')
            (self._home / 'socket').chmod(0o666)
            listener.listen()
            listener.setblocking(False)
            theirs.setblocking(False)
            self._process = subprocess.Popen(
                ['dbus-broker', '--controller', str(theirs.fileno()), '--machine-id', '0' * 31 + '1'],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            self._add_listener(mine, listener)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            terminate(self._process)
        if self._controller is not None:
            self._controller.close()
        for path in self._home.iterdir():
            path.unlink()
        self._home.rmdir()

    @staticmethod
    def _add_listener(controller: socket.socket, listener: socket.socket) -> None:
        controller.settimeout(10)
        authenticate(controller)
        call: Any = wire.make_call('org.bus1.DBus', '/org/bus1/DBus/Broker', 'org.bus1.DBus.Broker', 'AddListener',
                                   'ohv', ['/org/bus1/DBus/Listener/0', 0, allow_everything()])
        call.destination, call.serial, call.unix_fds = None, 1, [listener.fileno()]
        socket.send_fds(controller, [wire.marshal(call)], [listener.fileno()])
        reply = controller.recv(4096)
        assert reply[1:2] == bytes([MessageType.RETURN]), reply
