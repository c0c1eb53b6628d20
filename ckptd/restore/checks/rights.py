# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ids and capabilities: what the caller may not have, and what we cannot give.

A caller other than root gets back what is all his: his uid, groups that he is in, capabilities that he has. In a user
namespace of its own (an ordinary user without a service) a tree has one uid and one gid, and no others can be set.
"""

import os
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.records import Credentials
from ckptd.kernel.creds import CAP_SETGID, CAP_SETPCAP, CAP_SETUID
from ckptd.restore.checks.context import CheckContext, about, once
from ckptd.restore.plan import is_users_worker

# <linux/capability.h>, in its order
NAMES = ('chown', 'dac_override', 'dac_read_search', 'fowner', 'fsetid', 'kill', 'setgid', 'setuid', 'setpcap',
         'linux_immutable', 'net_bind_service', 'net_broadcast', 'net_admin', 'net_raw', 'ipc_lock', 'ipc_owner',
         'sys_module', 'sys_rawio', 'sys_chroot', 'sys_ptrace', 'sys_pacct', 'sys_admin', 'sys_boot', 'sys_nice',
         'sys_resource', 'sys_time', 'sys_tty_config', 'mknod', 'lease', 'audit_write', 'audit_control', 'setfcap',
         'mac_override', 'mac_admin', 'syslog', 'wake_alarm', 'block_suspend', 'audit_read', 'perfmon', 'bpf',
         'checkpoint_restore')
_ROOT = 'restore it as root'
_SETS = ('inheritable', 'permitted', 'effective', 'bounding', 'ambient')


def check(context: CheckContext) -> Iterator[Finding]:
    caller, manifest = context.request.caller, context.reader.manifest
    if caller.uid and manifest.owner_uid != caller.uid:
        yield about(0, 'image', 'EPERM', f'the image was made for uid {manifest.owner_uid}, the caller is uid '
                    f'{caller.uid}', 'restore it as that user, or as root')
    yield from _ours(context)
    yield from _confined(context)
    for process in context.plan.processes:
        found: list[Finding] = []
        for task in process.alive:
            record = context.reader.get(Credentials, task.vpid)
            found += [*_ids(context, record), *_capabilities(context, record)]
        yield from once(found)


def capability_names(mask: int) -> str:
    """'CAP_SYS_NICE, CAP_SYS_TIME'."""
    return ', '.join(f'CAP_{NAMES[bit].upper()}' if bit < len(NAMES) else f'capability {bit}'
                     for bit in range(64) if mask >> bit & 1)


def _ours(context: CheckContext) -> Iterator[Finding]:
    """Check the rights that it takes to set credentials at all."""
    if context.plan.namespaces.user or is_users_worker(context.plan):
        return
    uids = {uid for record in context.reader.every(Credentials) for uid in record.uids}
    needed = 1 << CAP_SETGID | 1 << CAP_SETPCAP | (1 << CAP_SETUID if uids - {os.geteuid()} else 0)
    lacking = needed & ~context.own.cap_eff
    if lacking:
        yield about(0, 'credentials', 'EPERM', f'ckptd lacks {capability_names(lacking)}', 'run ckptd as root')


def _confined(context: CheckContext) -> Iterator[Finding]:
    """A caller who has given up rights for good, for himself and all that he starts, gets none back by a restart."""
    caller = context.request.caller
    if not caller.uid or context.plan.namespaces.user:
        return
    if not caller.pid:
        yield about(0, 'credentials', 'ESRCH', 'it is not known which process asks, and what it has given up',
                    'ask again, and stay until there is an answer')
    if caller.seccomp:
        yield about(0, 'seccomp', 'EPERM', 'the caller runs under a seccomp filter, and the tree would not',
                    'ask from outside of the sandbox')
    free = any(not context.reader.get(Credentials, task.vpid).no_new_privs
               for process in context.plan.processes for task in process.alive)
    if caller.no_new_privs and free:
        yield about(0, 'no_new_privs', 'EPERM', 'the caller runs with no_new_privs, and the tree did not',
                    'ask from outside of the sandbox')


def _ids(context: CheckContext, record: Credentials) -> Iterator[Finding]:
    caller, vpid = context.request.caller, record.vpid
    if context.plan.namespaces.user:
        yield from _ids_in_namespace(record)
    elif is_users_worker(context.plan):
        yield from _ids_of_worker(context, record)
    elif caller.uid:
        groups = {caller.gid, *caller.groups}
        if strangers := sorted(set(record.uids) - {caller.uid}):
            yield about(vpid, 'uid', 'EPERM', f'runs as uid {_list(strangers)}, the caller is uid {caller.uid}',
                        _ROOT)
        if strangers := sorted({*record.gids, *record.groups} - groups):
            yield about(vpid, 'gid', 'EPERM', f'is in group {_list(strangers)}, the caller is not', _ROOT)


def _ids_of_worker(context: CheckContext, record: Credentials) -> Iterator[Finding]:
    """A worker that is a user has no other ids to give, and calls setgroups(2) for nobody: fewer groups than the user
    has would open files to them that deny a group."""
    own, vpid = context.own, record.vpid
    if strangers := sorted(set(record.uids) - {own.uids[1]}):
        yield about(vpid, 'uid', 'EPERM', f'runs as uid {_list(strangers)}, and is restored for uid {own.uids[1]}',
                    _ROOT)
    if strangers := sorted(set(record.gids) - {own.gids[1]}):
        yield about(vpid, 'gid', 'EPERM', f'runs as gid {_list(strangers)}, and is restored with gid {own.gids[1]}',
                    'restore it in a session that has this group (newgrp), or as root')
    if {*record.groups, own.gids[1]} != {*own.groups, own.gids[1]}:
        yield about(vpid, 'groups', 'EPERM', f'was in the groups {_list(record.groups)}, and comes back in those of '
                    f'the user: {_list(own.groups)}', 'restore it in a session that has the same groups', 'warning')
    if record.securebits:
        yield about(vpid, 'securebits', 'EPERM', f'has securebits {record.securebits:#x}, which take a right to set',
                    _ROOT)


def _ids_in_namespace(record: Credentials) -> Iterator[Finding]:
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


def _list(numbers: 'list[int] | tuple[int, ...]') -> str:
    return ', '.join(map(str, numbers)) or 'none'


def _capabilities(context: CheckContext, record: Credentials) -> Iterator[Finding]:
    vpid, user = record.vpid, context.plan.namespaces.user
    sets = dict(zip(_SETS, record.capabilities, strict=True))
    held = sets['permitted'] | sets['effective'] | sets['ambient'] | sets['inheritable']
    if user:
        if held:
            yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(held)}, which would count in a user '
                        'namespace of its own only', _ROOT)
        return
    if is_users_worker(context.plan):
        if held:
            yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(held)}, and the tree of a user comes '
                        'back without any', _ROOT)
        if missing := context.own.cap_bnd & ~sets['bounding']:
            yield context.beyond(about(vpid, 'capabilities', 'EPERM', f'lacks {capability_names(missing)} in its '
                                       'bounding set, which only root can take away again', _ROOT), 'with that of '
                                 'the caller')
    allowed = _of_caller(context)
    if held & ~allowed and not is_users_worker(context.plan):
        yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(held & ~allowed)}, the caller has not',
                    _ROOT)
    elif (beyond := held & ~context.own.cap_prm) and not is_users_worker(context.plan):
        yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(beyond)}, ckptd has not',
                    'run ckptd with these capabilities')
    caller = context.request.caller
    if caller.uid and caller.bounding >= 0 and (beyond := sets['bounding'] & ~caller.bounding):
        yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(beyond)} in its bounding set, the caller '
                    'has not', _ROOT)
    if beyond := sets['bounding'] & ~context.own.cap_bnd:
        yield about(vpid, 'capabilities', 'EPERM', f'has {capability_names(beyond)} in its bounding set, ckptd has '
                    'not, and what that set lacks never comes back', 'run ckptd with these capabilities '
                    '(CapabilityBoundingSet=)')


def _of_caller(context: CheckContext) -> int:
    caller = context.request.caller
    if caller.capabilities >= 0:
        return caller.capabilities
    return 0 if caller.uid else (1 << 64) - 1       # unknown: all for root, nothing for anybody else
