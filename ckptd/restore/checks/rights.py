# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check the caller of a restart against the tree as a whole: the owner of the image, restrictions of the caller, and
the rights needed to set credentials at all. objects/attributes/credentials.py checks those of each task."""

import os
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.records import Credentials
from ckptd.kernel.creds import CAP_SETGID, CAP_SETPCAP, CAP_SETUID, capability_names
from ckptd.restore.checks.context import CheckContext, about
from ckptd.restore.plan import is_users_worker


def check(context: CheckContext) -> Iterator[Finding]:
    caller, manifest = context.request.caller, context.reader.manifest
    if caller.uid and manifest.owner_uid != caller.uid:
        yield about(0, 'image', 'EPERM', f'the image belongs to uid {manifest.owner_uid}, the caller is uid '
                    f'{caller.uid}', 'restore it as that user, or as root')
    yield from _ours(context)
    yield from _confined(context)


def _ours(context: CheckContext) -> Iterator[Finding]:
    """Check the rights that are needed to set credentials at all."""
    if context.plan.namespaces.user or is_users_worker(context.plan):
        return
    uids = {uid for record in context.reader.every(Credentials) for uid in record.uids}
    needed = 1 << CAP_SETGID | 1 << CAP_SETPCAP | (1 << CAP_SETUID if uids - {os.geteuid()} else 0)
    lacking = needed & ~context.own.cap_eff
    if lacking:
        yield about(0, 'credentials', 'EPERM', f'ckptd lacks {capability_names(lacking)}', 'run ckptd as root')


def _confined(context: CheckContext) -> Iterator[Finding]:
    """Check the restrictions of the caller. A restart must not give back rights that the caller and its descendants
    have lost for good."""
    caller = context.request.caller
    if not caller.uid or context.plan.namespaces.user:
        return
    if not caller.pid:
        yield about(0, 'credentials', 'ESRCH', 'the calling process and its restrictions are unknown',
                    'call again, and stay until the answer')
    if caller.seccomp:
        yield about(0, 'seccomp', 'EPERM', 'the caller runs under a seccomp filter, and the tree would not',
                    'call from outside of the sandbox')
    free = any(not context.reader.get(Credentials, task.vpid).no_new_privs
               for process in context.plan.processes for task in process.alive)
    if caller.no_new_privs and free:
        yield about(0, 'no_new_privs', 'EPERM', 'the caller runs with no_new_privs, and the tree did not',
                    'call from outside of the sandbox')
