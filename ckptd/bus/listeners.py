# SPDX-License-Identifier: LGPL-2.1-or-later
"""Remember the listeners while no daemon runs. When a new daemon starts, its signals go to the connections that called
the last one, too.

    {runtime}/listeners     JSON: identity of the bus, unique names of the callers, and those whose view was asked
"""

import json
import logging
from pathlib import Path

from ckptd.bus.connection import Connection
from ckptd.bus.message import DBusError
from ckptd.bus.router import Router

log = logging.getLogger(__name__)

FILE = 'listeners'


async def keep(runtime: Path, connection: Connection, router: Router) -> None:
    """Save the names of all connections that have called. Without a bus there are none."""
    if not connection.connected:
        return
    try:
        text = json.dumps({'bus': await _identity(connection), 'senders': router.peers.senders,
                           'viewers': router.peers.viewers})
        (runtime / FILE).write_text(text)
    except (OSError, DBusError) as error:
        log.warning('cannot save the listeners: %s', error)


async def find_again(runtime: Path, connection: Connection, router: Router) -> None:
    """Load the saved names that are still on the bus. A bus gives no unique name twice."""
    path = runtime / FILE
    try:
        left = json.loads(path.read_text())
        path.unlink()
        if left['bus'] == await _identity(connection):
            await router.remember([str(sender) for sender in left['senders']], [str(one) for one in left['viewers']])
    except FileNotFoundError:
        return
    except (OSError, DBusError, ValueError, KeyError, TypeError) as error:
        log.warning('cannot load the listeners: %s: %s', path, error)


async def _identity(connection: Connection) -> str:
    [identity] = await connection.driver('GetId')
    return str(identity)
