# SPDX-License-Identifier: LGPL-2.1-or-later
"""Command lines for processes of a daemon that run Python modules of ckptd."""

import logging
import os
import sys
from pathlib import Path

import ckptd
from ckptd.notify import without_service_manager

# -I: the interpreter takes nothing from its environment, the working directory or the user's home
_ISOLATED = ('import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); '
             'runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)')


def home() -> str:
    """Return the directory from which this ckptd was imported."""
    return str(Path(ckptd.__file__).parent.parent)


def command(module: str) -> tuple[str, ...]:
    """Return a command line that runs a module of this ckptd. Append the module's arguments."""
    if os.geteuid() == 0:
        return (sys.executable, '-I', '-c', _ISOLATED, home(), module)
    # -P: a directory named ckptd in the working directory must not be imported instead
    return (sys.executable, '-P', '-m', module)


def environment() -> dict[str, str]:
    """Return the daemon's environment without the variables that systemd sets for this process alone. For a Python that
    is not isolated, it leads to the same ckptd."""
    level = logging.getLevelName(logging.getLogger('ckptd.worker').getEffectiveLevel())
    ours = {**without_service_manager(os.environ), 'CKPTD_LOG_LEVEL': level}
    if os.geteuid() == 0:
        return {name: value for name, value in ours.items() if not name.startswith('PYTHON')}
    others = [path for path in os.environ.get('PYTHONPATH', '').split(os.pathsep) if path and path != home()]
    return {**ours, 'PYTHONPATH': os.pathsep.join([home(), *others])}
