# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the processes of a daemon are started that are Python programs of ckptd's own."""

import logging
import os
import sys
from pathlib import Path

import ckptd
from ckptd.notify import without_service_manager

# with -I an interpreter takes nothing from its environment, the working directory or the home of its user
_ISOLATED = ('import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); '
             'runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)')


def home() -> str:
    """The directory that this ckptd was imported from."""
    return str(Path(ckptd.__file__).parent.parent)


def command(module: str) -> tuple[str, ...]:
    """A command line that runs a module of this very ckptd, to be followed by its arguments."""
    if os.geteuid() == 0:
        return (sys.executable, '-I', '-c', _ISOLATED, home(), module)
    # -P: a directory named ckptd where the daemon was started must not be what runs
    return (sys.executable, '-P', '-m', module)


def environment() -> dict[str, str]:
    """Ours, without what systemd says to this process alone; for a Python that is not isolated, the same ckptd; and
    what of its log anybody will read."""
    level = logging.getLevelName(logging.getLogger('ckptd.worker').getEffectiveLevel())
    ours = {**without_service_manager(os.environ), 'CKPTD_LOG_LEVEL': level}
    if os.geteuid() == 0:
        return {name: value for name, value in ours.items() if not name.startswith('PYTHON')}
    others = [path for path in os.environ.get('PYTHONPATH', '').split(os.pathsep) if path and path != home()]
    return {**ours, 'PYTHONPATH': os.pathsep.join([home(), *others])}
