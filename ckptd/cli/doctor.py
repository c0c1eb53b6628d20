# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl doctor: check that this machine has what ckptd uses.

The kernel is probed in a separate process. Probing tries things out (namespaces, ptrace, another uid), and the client
must not be affected.
"""

import json
import shutil
import sys
from typing import Any

from ckptd.cli.output import Output
from ckptd.cli.program import run_program
from ckptd.cli.session import Session
from ckptd.cli.standalone import environment
from ckptd.errors import CkptError, NotSupported

PROBE_TIMEOUT = 60.0
YAMA = 'yama ptrace_scope'      # not fatal for all: with value 1 the daemon may still trace its own children
MARKS = {True: ('yes', 'green'), False: ('no ', 'red'), None: ('?  ', 'yellow')}

# programs that ckptd or its users call: purpose, what is lost without it, how to get it
PROGRAMS = {
    'dbus-daemon': ('a private bus', '--standalone and demo', 'apt-get install dbus-daemon'),
    'gdb': ('looking at exported cores', 'backtraces in the demo', 'apt-get install gdb'),
}


async def doctor(session: Session) -> int:
    """List features and programs. The exit status is 1 if a required one is missing."""
    features = await read_features() + [_program(name) for name in PROGRAMS]
    features.append(await _daemon(session))
    if session.out.json:
        session.out.document(features)
    else:
        for feature in features:
            print_feature(session.out, feature)
        _total(session.out, features)
    return NotSupported.exit_status if any(map(is_fatal, features)) else 0


async def read_features() -> list[dict[str, Any]]:
    """Run ckptd.kernel.probe. Its rows have: name, present (null: unknown), required, needed_for, lost, hint,
    detail."""
    done = await run_program(sys.executable, '-P', '-m', 'ckptd.kernel.probe', seconds=PROBE_TIMEOUT, env=environment())
    if done.status != 0:
        said = done.complaint.strip().splitlines()
        raise CkptError(f'the kernel could not be probed: {said[-1] if said else done.status}', hint='')
    features: list[dict[str, Any]] = json.loads(done.out)
    return features


async def report_missing(out: Output) -> None:
    """List the missing features that every checkpoint needs, after a checkpoint failed."""
    try:
        missing = [feature for feature in await read_features() if is_fatal(feature) or (
            feature['present'] is False and feature['name'] == YAMA)]
    except CkptError:
        return      # the failure itself is about to be reported
    if missing:
        out.line('\nMissing on this machine or for this user:', 'bold')
    for feature in missing:
        print_feature(out, feature)


def print_feature(out: Output, feature: dict[str, Any]) -> None:
    """Print one line for a feature. For a missing one add what is lost and how to get it."""
    mark, style = MARKS[feature['present']]
    detail = f': {feature["detail"]}' if feature['detail'] else ''
    out.line(f'{mark}  {feature["name"]:<30}  {feature["needed_for"]}{detail}', style)
    if feature['present'] is True:
        return
    out.line(f'     lost without it: {feature["lost"]}')
    if feature['hint']:
        out.line(f'     to get it:       {feature["hint"]}')


def _program(name: str) -> dict[str, Any]:
    path = shutil.which(name)
    needed_for, lost, hint = PROGRAMS[name]
    return _row(name, path is not None, needed_for, lost, hint, path or '')


async def _daemon(session: Session) -> dict[str, Any]:
    """Check whether ckptd answers on the bus of this command line."""
    name, needed_for = 'ckptd on the bus', 'commands without --standalone'
    try:
        async with session.daemon() as daemon:
            properties = await daemon.manager_properties()
    except CkptError as error:
        return _row(name, False, needed_for, 'needs --standalone', error.hint, error.message)
    return _row(name, True, needed_for, '', '', f'version {properties["Version"]}, spool {properties["Spool"]}')


def _row(name: str, present: bool, needed_for: str, lost: str, hint: str, detail: str) -> dict[str, Any]:
    """Make a row like those of the probe."""
    return {'name': name, 'present': present, 'required': False, 'needed_for': needed_for, 'lost': lost, 'hint': hint,
            'detail': detail}


def _total(out: Output, features: list[dict[str, Any]]) -> None:
    if not out.legend:
        return
    present = sum(feature['present'] is True for feature in features)
    out.line(f'\n{present} of {len(features)} are present.')
    if missing := [feature['name'] for feature in features if is_fatal(feature)]:
        out.line(f'Nothing can be checkpointed without {", ".join(missing)}.', 'bold red')
    else:
        out.line('Trees can be checkpointed.', 'bold green')


def is_fatal(feature: dict[str, Any]) -> bool:
    return feature['required'] and feature['present'] is False
