# SPDX-License-Identifier: LGPL-2.1-or-later
"""sd_notify(3) and the watchdog of systemd.service(5), without libsystemd."""

import logging
import os
import socket
from dataclasses import dataclass
from typing import Self

log = logging.getLogger(__name__)

PATIENCE = 0.5      # seconds; a datagram socket whose reader sleeps is full after some ten messages (unix(7))


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """Who started us. address: of its notification socket, '' for none. watchdog: seconds between two WATCHDOG=1,
    half of what it allows (sd_watchdog_enabled(3)); None for no watchdog."""
    address: str = ''
    watchdog: float | None = None

    @classmethod
    def take(cls) -> Self:
        """From the environment, and out of it: a dbus-daemon that we start would say READY=1 for us."""
        address = os.environ.pop('NOTIFY_SOCKET', '')
        usec, pid = os.environ.pop('WATCHDOG_USEC', ''), os.environ.pop('WATCHDOG_PID', '')
        ours = usec.isdigit() and int(usec) > 0 and pid in ('', str(os.getpid()))
        return cls(address if address.startswith(('/', '@')) else '', int(usec) / 2e6 if ours else None)

    def notify(self, *assignments: str) -> bool:
        """Send 'READY=1', 'STATUS=...'; False where nobody listens."""
        if not self.address:
            return False
        # '@' stands for the NUL byte of an abstract socket, unix(7)
        address = '\0' + self.address[1:] if self.address.startswith('@') else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(address)
                sock.send('\n'.join(assignments).encode())
        except OSError as error:
            log.warning('cannot notify the service manager: %s', error)
            return False
        return True
