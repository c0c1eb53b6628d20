# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of the surroundings of a tree: its unit, cgroup, namespaces, controlling terminal and job control."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

from ckptd.errors import Finding, InvalidArgument
from ckptd.image.records import ProcessState
from ckptd.kernel.cgroup import Cgroup, find_mount
from ckptd.kernel.procfs import read_file
from ckptd.kernel.units import unit_directories
from ckptd.objects.namespaces.registry import restart_findings
from ckptd.objects.verify import sessions
from ckptd.restore.cgroups import cgroups
from ckptd.restore.checks.context import CheckContext, about
from ckptd.restore.job_control import Stops
from ckptd.target import UnitTarget, parse_target


def check(context: CheckContext) -> Iterator[Finding]:
    if context.request.cgroup:
        yield from _cgroup(context, context.request.cgroup)
    elif not context.request.systemd and not context.request.brokered:      # otherwise they make a place
        yield from _cgroups(context)
    yield from _unit(context)
    yield from restart_findings(context.reader, context.plan.processes[0].vpid, context.plan.namespaces)
    yield from _terminal(context)
    yield from _stops(context)


def _unit(context: CheckContext) -> Iterator[Finding]:
    """Look for another instance of the unit that was dumped. A restart that the unit itself asks for is no other
    one."""
    request = context.request
    try:
        unit = parse_target(context.reader.manifest.target)
        mount = find_mount()
    except (InvalidArgument, FileNotFoundError):
        return
    if request.force or not isinstance(unit, UnitTarget) or not unit.is_program:
        return
    for directory in unit_directories(mount, 0 if request.brokered else os.geteuid(), unit.name):
        members = Cgroup(directory).procs(recursive=True)
        if members and request.caller.pid not in members:
            yield about(0, f'unit {unit}', 'EBUSY', 'another instance of it runs',
                        f'systemctl stop {unit}, or restore beside it with --force')


def _cgroup(context: CheckContext, name: str) -> Iterator[Finding]:
    hint = 'choose an existing cgroup that the caller may write, with --cgroup'
    try:
        group = Cgroup.named(name)
    except FileNotFoundError as error:
        yield about(0, f'cgroup {name}', 'ENOENT', str(error.strerror), 'mount cgroup2, or leave out --cgroup')
        return
    if '..' in name.split('/') or not group.exists:
        # without systemd, which would own it, it is made for root (restore/cgroups.py)
        if '..' in name.split('/') or context.request.systemd or context.request.caller.uid:
            yield about(0, f'cgroup {name}', 'ENOENT', 'the cgroup does not exist', hint)
    elif not (context.caller_may(str(group.path), os.W_OK)
              and context.caller_may(f'{group.path}/cgroup.procs', os.W_OK)):
        yield about(0, f'cgroup {name}', 'EACCES', 'the caller may not put processes there', hint)
    elif group.type not in ('domain', 'domain threaded'):
        yield about(0, f'cgroup {name}', 'EOPNOTSUPP', f'it is of type "{group.type}" and takes no processes', hint)
    elif group.parent is not None and read_file(f'{group.path}/cgroup.subtree_control').strip():
        # "no internal process constraint" (Documentation/admin-guide/cgroup-v2.rst)
        yield about(0, f'cgroup {name}', 'EBUSY', 'it delegates controllers to the cgroups below it, and takes no '
                    'processes itself', 'choose one below it')


def _cgroups(context: CheckContext) -> Iterator[Finding]:
    first: dict[str, int] = {}      # many processes may be in few cgroups
    for vpid, name in sorted(cgroups(context.plan.processes).items()):
        first.setdefault(name, vpid)
    for name, vpid in first.items():
        with suppress(FileNotFoundError):       # no mount of cgroup v2 shows it
            path = Cgroup.named(name).path
            nearest = next(above for above in (path, *path.parents) if above.exists())
            if name and nearest != path and not os.access(nearest, os.W_OK):
                yield about(vpid, f'cgroup {name}', 'EACCES', 'was in a cgroup that is gone, and may not be made '
                            'again: it comes back in that of ckptd', 'choose one with --cgroup', 'warning')


def _terminal(context: CheckContext) -> Iterator[Finding]:
    lookup, own = context.lookup, sessions(context.reader, context.lookup.kinds)
    if lookup.terminal and not lookup.detach_terminal:
        return
    sessions_of = {process.vpid: process.leader.vsid for process in context.plan.processes}
    first = next((vpid for vpid in context.leaders
                  if context.reader.get(ProcessState, vpid).tty and sessions_of[vpid] not in own), 0)
    if not first:
        return
    if lookup.detach_terminal:
        yield about(first, 'terminal', 'ENOTTY', 'had a controlling terminal, and comes back without one',
                    'restore with --wait in a terminal', 'warning')
    else:
        yield about(first, 'terminal', 'ENOTTY', 'had a controlling terminal, whose program is outside of the tree',
                    'restore with --wait in a terminal, which takes its place, or with --terminal=detach')


def _stops(context: CheckContext) -> Iterator[Finding]:
    """Check stops by a terminal, which need a parent in another group of the session, such as the shell that started
    the tree."""
    stops = Stops(context.plan.processes, all_=False)
    for process in context.plan.processes:
        wanted = process.alive[0].record.stop_signal if process.alive else 0
        if wanted and (found := stops.signal_of(process)) != wanted:
            yield about(process.vpid, 'job control', 'EOPNOTSUPP', f'was stopped by {_name(wanted)}, and comes back '
                        f'stopped by {_name(found)}: its process group is orphaned', 'SIGCONT lets it go on as before',
                        'warning')


def _name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f'signal {number}'
