# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl inhibit and ckptctl inhibitors: delays of checkpoints."""

import os
import subprocess

from ckptd.bus.names import MANAGER, ROOT
from ckptd.cli.images import user_name
from ckptd.cli.output import Column
from ckptd.cli.session import Session
from ckptd.errors import InvalidArgument

COLUMNS = (Column('WHO', style='bold'), Column('TARGET', fold=True), Column('USER'), Column('PID', right=True),
           Column('WHY', fold=True))


async def inhibit(session: Session) -> int:
    """Run a program and delay checkpoints of the target until it ends. Return its exit status."""
    args = session.args
    if not args.program:
        raise InvalidArgument('no program to run is given', hint='ckptctl inhibit TARGET PROGRAM...')
    async with session.daemon() as daemon:
        fd = await daemon.call_for_fd(ROOT, MANAGER, 'Inhibit', 'ssa{sv}', args.who or args.program[0], args.why,
                                      {'target': args.target})
        try:
            status = subprocess.run(args.program, check=False).returncode      # noqa: ASYNC221 - nothing else to do
        finally:
            os.close(fd)
    return status if status >= 0 else 128 - status


async def inhibitors(session: Session) -> int:
    """List the inhibitors that the caller may see."""
    async with session.daemon() as daemon:
        rows = await daemon.manager('ListInhibitors')
    if session.out.json:
        session.out.document([dict(zip(('who', 'why', 'target', 'uid', 'pid'), row, strict=True)) for row in rows])
        return 0
    session.out.table(COLUMNS, [[who, target, user_name(uid), str(pid), why] for who, why, target, uid, pid in rows],
                      empty='No inhibitors.', what='inhibitors')
    return 0
