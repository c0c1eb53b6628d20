# SPDX-License-Identifier: LGPL-2.1-or-later
"""sd_notify(3) and the watchdog of systemd.service(5), without libsystemd."""

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(*assignments: str) -> bool:
    """Send 'READY=1', 'STATUS=...' to whoever started us; False where nobody listens."""
    address = os.environ.get('NOTIFY_SOCKET', '')
    if not address.startswith(('/', '@')):
        return False
    if address.startswith('@'):
        address = '\0' + address[1:]    # an abstract socket, unix(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.send('\n'.join(assignments).encode())
    except OSError as error:
        log.warning('cannot notify the service manager: %s', error)
        return False
    return True


def watchdog_interval() -> float | None:
    """Seconds between two WATCHDOG=1, half of what systemd allows (sd_watchdog_enabled(3)); None for no watchdog."""
    usec, pid = os.environ.get('WATCHDOG_USEC', ''), os.environ.get('WATCHDOG_PID', '')
    if not usec.isdigit() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2e6
