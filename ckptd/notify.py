# SPDX-License-Identifier: LGPL-2.1-or-later
"""sd_notify(3) and the watchdog of systemd.service(5), without libsystemd."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

log = logging.getLogger(__name__)

PATIENCE = 0.5      # seconds; a datagram socket whose reader sleeps is full after some ten messages (unix(7))
# Variables that a service manager sets for the one process that it starts: sd_notify(3), sd_watchdog_enabled(3),
# sd_listen_fds(3), sd_pid_notify_with_fds(3).
_NAMES = frozenset({'NOTIFY_SOCKET', 'FDSTORE'})
_PREFIXES = ('WATCHDOG_', 'LISTEN_')


def without_service_manager(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a child's environment, without the variables that would let the child speak for our unit."""
    return {name: value for name, value in environment.items() if not _is_for_us_alone(name)}


def _is_for_us_alone(name: str) -> bool:
    return name in _NAMES or name.startswith(_PREFIXES)


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """The service manager that started this process, if any."""
    address: str = ''                # address of its notification socket, '' for none
    watchdog: float | None = None    # seconds between two WATCHDOG=1: half of what the manager allows
                                     # (sd_watchdog_enabled(3)); None for no watchdog

    @classmethod
    def take(cls, private: bool = False) -> Self:
        """Read the service manager's variables and remove them from the environment.

        Otherwise a dbus-daemon started by ckptd would inherit them and send READY=1 for our unit. private: a client has
        started this daemon for itself. The unit around it belongs to the client or to a program above the client, so
        ckptd must not speak in its name.
        """
        given = {name: os.environ.pop(name) for name in list(os.environ) if _is_for_us_alone(name)}
        # SYSTEMD_EXEC_PID is the process that systemd has started. Any other process has inherited it
        # (systemd.exec(5)).
        if private or not _is_us(os.environ.get('SYSTEMD_EXEC_PID', '')):
            return cls()
        address, usec = given.get('NOTIFY_SOCKET', ''), given.get('WATCHDOG_USEC', '')
        ours = usec.isdigit() and int(usec) > 0 and _is_us(given.get('WATCHDOG_PID', ''))
        return cls(address if address.startswith(('/', '@')) else '', int(usec) / 2e6 if ours else None)

    def notify(self, *assignments: str) -> bool:
        """Send assignments such as 'READY=1' and 'STATUS=...'. Return False if no manager listens."""
        if not self.address:
            return False
        # '@' stands for the NUL byte of an abstract socket (unix(7)).
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


def _is_us(pid: str) -> bool:
    """Whether a variable names this process or is not set."""
    return pid in ('', str(os.getpid()))
