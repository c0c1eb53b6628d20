# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who listens, kept while no daemon runs: one that has ended is started again, and what it then says goes to those who
called the last one, too.

    {runtime}/listeners     JSON: the bus, whose unique names these are, the names, and those asked about
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
    """Leave word of all who have called. Without a bus there is nobody."""
    if not connection.connected:
        return
    try:
        text = json.dumps({'bus': await _identity(connection), 'senders': router.peers.senders,
                           'viewers': router.peers.viewers})
        (runtime / FILE).write_text(text)
    except (OSError, DBusError) as error:
        log.warning('who listens is forgotten: %s', error)


async def find_again(runtime: Path, connection: Connection, router: Router) -> None:
    """Know those again who are still there. A bus gives no unique name twice."""
    path = runtime / FILE
    try:
        left = json.loads(path.read_text())
        path.unlink()
        if left['bus'] == await _identity(connection):
            await router.remember([str(sender) for sender in left['senders']], [str(one) for one in left['viewers']])
    except FileNotFoundError:
        return
    except (OSError, DBusError, ValueError, KeyError, TypeError) as error:
        log.warning('who listens is not known: %s: %s', path, error)


async def _identity(connection: Connection) -> str:
    [identity] = await connection.driver('GetId')
    return str(identity)
