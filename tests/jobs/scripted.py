# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd whose workers play scenes (player.py), with ckptd's own arguments: python -m tests.jobs.scripted --private ...

The scene of a restore is named by the target in the image's manifest.
"""

import sys
from functools import partial
from pathlib import Path

from ckptd import daemon
from ckptd.jobs.pool import WorkerPool
from tests.lib.bus import Daemon

PLAYER = (sys.executable, str(Path(__file__).with_name('player.py')))


class ScriptedDaemon(Daemon):
    """One, for a test."""
    module = 'tests.jobs.scripted'


if __name__ == '__main__':
    daemon.WorkerPool = partial(WorkerPool, PLAYER)
    sys.exit(daemon.main())
