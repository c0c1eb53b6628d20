# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces opened as files: one's own, that of the parent, one in flight; and two fds of one description."""

import os
import socket
from pathlib import Path

from victim import not_the_one_to_report, ready, wait_for_go

NAMES = [path.name for path in Path('/proc/self/ns').iterdir() if not path.name.endswith('_for_children')]


def check(name: str, fd: int) -> None:
    own = Path(f'/proc/self/ns/{name}').stat()
    found = os.fstat(fd)
    assert (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino), name
    assert str(Path(f'/proc/self/fd/{fd}').readlink()) == f'{name}:[{own.st_ino}]'


def child_main(go: int) -> None:
    not_the_one_to_report()
    of_parent = os.open(f'/proc/{os.getppid()}/ns/ipc', os.O_RDONLY)
    os.read(go, 1)
    check('ipc', of_parent)
    os._exit(0)


def main() -> None:
    fds = {name: os.open(f'/proc/self/ns/{name}', os.O_RDONLY) for name in NAMES}
    twin = os.dup(fds['uts'])
    sender, receiver = socket.socketpair()
    in_flight = os.open('/proc/self/ns/net', os.O_RDONLY)
    socket.send_fds(sender, [b'n'], [in_flight])
    os.close(in_flight)
    go, tell = os.pipe()
    child = os.fork()
    if child == 0:
        child_main(go)
    ready()
    wait_for_go()
    for name, fd in fds.items():
        check(name, fd)
    check('uts', twin)
    _, [arrived], _, _ = socket.recv_fds(receiver, 1, 1)
    check('net', arrived)
    os.write(tell, b'g')
    assert os.waitpid(child, 0) == (child, 0)


main()
