# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ids, groups, capabilities, securebits and no_new_privs of a thread (credentials(7), capabilities(7)).

A caller other than root gets only what is theirs: their uid, groups that they are in, capabilities that they have. In a
user namespace of its own (for an ordinary user without a service) a tree has one uid and one gid, and no others can be
set.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence

from ckptd.errors import Finding
from ckptd.image import records
from ckptd.image.reader import ImageTask
from ckptd.kernel.creds import LINUX_CAPABILITY_VERSION_3, capability_names, capget, last_capability
from ckptd.kernel.prctl import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    PR_GET_KEEPCAPS,
    PR_GET_SECUREBITS,
    PR_SET_KEEPCAPS,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECUREBITS,
)
from ckptd.kernel.status import Status
from ckptd.objects.attributes.base import (
    Attribute,
    CallerIds,
    DumpedTask,
    Reader,
    RestartRights,
    RestoredTask,
    Stage,
    about,
)
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Results
from ckptd.remote.script import Script
from ckptd.tree import Task

SECBIT_KEEP_CAPS, SECBIT_NO_SETUID_FIXUP = 1 << 4, 1 << 2       # <linux/securebits.h>
_ALL = (1 << 64) - 1
_ROOT = 'restore it as root'
_SETS = ('inheritable', 'permitted', 'effective', 'bounding', 'ambient')


class CredentialsAttribute(Attribute[records.Credentials, tuple[int, int]], name='credentials', stage=Stage.RIGHTS):
    support = Support('ids, groups, capabilities, securebits and no_new_privs',
                      refused='more rights than the caller of the restart has',
                      user='other ids, capabilities and securebits are refused; other groups are a warning')

    def ask(self, batch: Batch) -> Reader[tuple[int, int]]:
        securebits, keepcaps = batch.call('prctl', PR_GET_SECUREBITS), batch.call('prctl', PR_GET_KEEPCAPS)

        def read(results: Results) -> tuple[int, int]:
            return results.unsigned(securebits), results.unsigned(keepcaps)
        return read

    def dump(self, of: DumpedTask, answer: tuple[int, int]) -> records.Credentials:
        securebits, keepcaps = answer
        return _record(of.task, of.status, securebits, keepcaps)

    def dump_dead(self, task: Task, status: Status) -> records.Credentials:
        """Dump the rest of a dead task: its parent gets the real uid with the exit code (waitid(2), si_uid)."""
        return _record(task, status, 0, 0)

    def obstacles(self, record: records.Credentials, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        yield from _ids(record, rights)
        yield from _capabilities(record, rights)

    def restore(self, record: records.Credentials, to: RestoredTask) -> None:
        """Set the credentials. Without rights, only those are set that need none; the shed itself clears
        capabilities."""
        if not to.means.is_users_worker:
            _set(record, to.script, ids=to.means.sets_ids)
        elif record.keepcaps:
            to.script.call('prctl', PR_SET_KEEPCAPS, 1, 0, 0, 0, about='keeping capabilities')
        if record.no_new_privs:
            to.script.call('prctl', PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _record(task: Task, status: Status, securebits: int, keepcaps: int) -> records.Credentials:
    return records.Credentials(
        task.vtid, status.uids, status.gids, status.groups,
        (status.cap_inh, status.cap_prm, status.cap_eff, status.cap_bnd, status.cap_amb), securebits,
        int(status.no_new_privs), keepcaps)


# ---------------------------------------------------------------- restore

def _set(record: records.Credentials, script: Script, *, ids: bool) -> None:
    """Set ids, groups, capabilities, securebits. ids: False if a user namespace has only one uid and gid, and forbids
    setgroups(2)."""
    inheritable, permitted, effective, bounding, ambient = record.capabilities
    for capability in range(last_capability() + 1):
        if not bounding >> capability & 1:
            script.call('prctl', PR_CAPBSET_DROP, capability, 0, 0, 0, about='the capability bounding set')
    if ids:
        script.call('prctl', PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
        script.call('setgroups', len(record.groups), struct.pack(f'<{len(record.groups)}I', *record.groups) or b'\0')
        script.call('setresgid', *record.gids[:3], about='group ids')
        script.call('setfsgid', record.gids[3])
        script.call('setresuid', *record.uids[:3], about='user ids')
        script.call('setfsuid', record.uids[3])
    full = capget().permitted if ids else _ALL >> 63 - last_capability()
    _capset(script, full | permitted, full | permitted, inheritable)
    for capability in range(last_capability() + 1):
        if ambient >> capability & 1:
            script.call('prctl', PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0, about='ambient capabilities')
    script.call('prctl', PR_SET_SECUREBITS, record.securebits, 0, 0, 0, about='securebits')
    _capset(script, effective, permitted, inheritable)


def _capset(script: Script, effective: int, permitted: int, inheritable: int) -> None:
    low = (1 << 32) - 1
    header = struct.pack('<Ii', LINUX_CAPABILITY_VERSION_3, 0)
    data = struct.pack('<6I', effective & low, permitted & low, inheritable & low, effective >> 32, permitted >> 32,
                       inheritable >> 32)
    script.call('capset', header, data, about='capabilities')


# ---------------------------------------------------------------- obstacles

def _ids(record: records.Credentials, rights: RestartRights) -> Iterator[Finding]:
    caller, vpid = rights.caller, record.vpid
    if rights.in_user_namespace:
        yield from _ids_in_namespace(record)
    elif rights.is_users_worker:
        yield from _ids_of_worker(record, rights.own)
    elif caller.uid:
        groups = {caller.gid, *caller.groups}
        if strangers := sorted(set(record.uids) - {caller.uid}):
            yield about(vpid, 'uid', 'EPERM', f'runs as uid {_list(strangers)}, the caller is uid {caller.uid}',
                        _ROOT)
        if strangers := sorted({*record.gids, *record.groups} - groups):
            yield about(vpid, 'gid', 'EPERM', f'is in group {_list(strangers)}, the caller is not', _ROOT)


def _ids_of_worker(record: records.Credentials, own: Status) -> Iterator[Finding]:
    """Check a worker of a user, which has no other ids to give. It never calls setgroups(2): with fewer groups than the
    user has, files would be open to them that deny a group."""
    vpid = record.vpid
    if strangers := sorted(set(record.uids) - {own.uids[1]}):
        yield about(vpid, 'uid', 'EPERM', f'runs as uid {_list(strangers)}, and is restored for uid {own.uids[1]}',
                    _ROOT)
    if strangers := sorted(set(record.gids) - {own.gids[1]}):
        yield about(vpid, 'gid', 'EPERM', f'runs as gid {_list(strangers)}, and is restored with gid {own.gids[1]}',
                    'restore it in a session that has this group (newgrp), or as root')
    if {*record.groups, own.gids[1]} != {*own.groups, own.gids[1]}:
        yield about(vpid, 'groups', 'EPERM', f'was in the groups {_list(record.groups)}, and comes back in those of '
                    f'the user: {_list(own.groups)}', 'restore it in a session that has the same groups', 'warning')
    if bits := record.securebits & ~SECBIT_KEEP_CAPS:
        yield about(vpid, 'securebits', 'EPERM', f'has securebits {bits:#x}, which take a right to set', _ROOT)


def _ids_in_namespace(record: records.Credentials) -> Iterator[Finding]:
    uid, gid, groups = os.geteuid(), os.getegid(), set(os.getgroups())
    why = 'and a user namespace made without privilege has no other'
    if strangers := sorted(set(record.uids) - {uid}):
        yield about(record.vpid, 'uid', 'EPERM', f'runs as uid {_list(strangers)}; we are uid {uid}, {why}', _ROOT)
    if strangers := sorted(set(record.gids) - {gid}):
        yield about(record.vpid, 'gid', 'EPERM', f'runs as gid {_list(strangers)}; we are gid {gid}, {why}', _ROOT)
    if set(record.groups) - {gid} != groups - {gid}:
        yield about(record.vpid, 'groups', 'EPERM', f'is in the groups {_list(record.groups)}, we are in those of '
                    f'{_list(sorted(groups))}, and setgroups(2) is denied', 'restore it in a session that has the '
                    'same groups (newgrp, sg), or as root')


def _list(numbers: Sequence[int]) -> str:
    return ', '.join(map(str, numbers)) or 'none'


def _capabilities(record: records.Credentials, rights: RestartRights) -> Iterator[Finding]:
    vpid, own, caller = record.vpid, rights.own, rights.caller
    sets = dict(zip(_SETS, record.capabilities, strict=True))
    held = sets['permitted'] | sets['effective'] | sets['ambient'] | sets['inheritable']
    if rights.in_user_namespace:
        if held:
            yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(held)}, which would count in a user '
                        'namespace of its own only', _ROOT)
        return
    if rights.is_users_worker:
        if held:
            yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(held)}, and the tree of a user comes '
                        'back without any', _ROOT)
        if missing := own.cap_bnd & ~sets['bounding']:
            yield rights.beyond(about(vpid, 'capabilities', 'EPERM', f'lacks {capability_names(missing)} in its '
                                       'bounding set, which only root can take away again', _ROOT), 'with that of '
                                 'the caller')
    allowed = _of_caller(caller)
    if held & ~allowed and not rights.is_users_worker:
        yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(held & ~allowed)}, the caller has not',
                    _ROOT)
    elif (beyond := held & ~own.cap_prm) and not rights.is_users_worker:
        yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(beyond)}, ckptd has not',
                    'run ckptd with these capabilities')
    if caller.uid and caller.bounding >= 0 and (beyond := sets['bounding'] & ~caller.bounding):
        yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(beyond)} in its bounding set, the caller '
                    'has not', _ROOT)
    if beyond := sets['bounding'] & ~own.cap_bnd:
        yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(beyond)} in its bounding set, ckptd has '
                    'not, and what that set lacks never comes back', 'run ckptd with these capabilities '
                    '(CapabilityBoundingSet=)')


def _of_caller(caller: CallerIds) -> int:
    if caller.capabilities >= 0:
        return caller.capabilities
    return 0 if caller.uid else (1 << 64) - 1       # unknown: all for root, none for other users
