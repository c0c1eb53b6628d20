# SPDX-License-Identifier: LGPL-2.1-or-later
"""The user with whose rights a job is done, and the launcher, which turns a process of root into that user for good.

    caller          job                             the worker is
    root            all but these                   root
    root            a checkpoint of a tree of one   that user
                    user, who might trace all of
                    it, and the check for that
    a user          any                             that user, with CAP_CHECKPOINT_RESTORE and no other capability
    a user          a checkpoint that polkit        the same, with CAP_SYS_PTRACE until the tree is traced (with
                    allows in spite of Yama         ptrace_scope 2: until its memory is read); before and after that,
                                                    the kernel is asked about each task as that user without it
    root            a restore of a user's image     that user

CAP_CHECKPOINT_RESTORE is needed to choose pids (set_tid), for map_files and for PR_SET_MM_MAP with an executable. It
gives access to no file and no process of other users. The worker is not dumpable (changing its ids clears that), and no
process without the capability may trace it. So no other process of that uid may ever have the capability.
"""

import errno
import os
import pwd
import resource
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from ckptd.errors import CkptError, NoSuchTarget
from ckptd.image.manifest import Manifest
from ckptd.inspect.checks.access import probe
from ckptd.inspect.scan import scan_tree
from ckptd.kernel import cgroup1
from ckptd.kernel.bounds import Bounds, read_bounds
from ckptd.kernel.clone import CLONE_NEWPID
from ckptd.kernel.creds import (
    CAP_CHECKPOINT_RESTORE,
    CAP_SYS_PTRACE,
    Capabilities,
    capset,
    last_capability,
    set_keepcaps,
)
from ckptd.kernel.keyctl import join_new_session_keyring
from ckptd.kernel.prctl import PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, PR_CAPBSET_DROP, prctl
from ckptd.kernel.status import Status, read_status
from ckptd.kernel.task import RLIM_INFINITY
from ckptd.kernel.timens import unshare
from ckptd.kernel.yama import CAPABLE, DECLARED, ptrace_scope
from ckptd.protocol.requests import Caller, CheckpointRequest, DumpRequest, JobRequest, RestartRequest

_KEPT_CAPABILITIES = 1 << CAP_CHECKPOINT_RESTORE
# limits for the tree that would end the worker in the middle of its work; the plan of a restart compares them
_NOT_FOR_THE_WORKER = (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_AS)


class Identity(NamedTuple):
    """A user, and the bounds of their calling process, which apply to the tree."""
    uid: int
    gid: int
    groups: tuple[int, ...]
    bounding: int = (1 << 64) - 1             # capability bounding set, a mask
    capabilities: int = _KEPT_CAPABILITIES    # of the worker, a mask
    bounds: Bounds = Bounds()
    new_pidns: bool = False                   # children of the worker are born in a new pid namespace, where the first
                                              # of them is process 1


def identity_of(request: JobRequest, manifest: Manifest | None) -> Identity | None:
    """Return the user that the worker of this job becomes; None if it stays what it is.

    manifest: of the job's image, if any. NoSuchTarget for a restart if the calling process is gone and its bounds are
    unknown.
    """
    if os.geteuid() != 0:
        return None
    if request.caller.uid:
        identity = _of_caller(request)
    elif manifest is not None and manifest.owner_uid and isinstance(request, RestartRequest):
        identity = _of_account(manifest.owner_uid, manifest.owner_gid)
    else:
        return None
    if not isinstance(request, RestartRequest):
        return identity
    return identity._replace(new_pidns=request.new_pidns or (manifest is not None and manifest.own_pidns))


def _of_caller(request: JobRequest) -> Identity:
    caller, bounds = request.caller, request.caller.bounds
    if bounds is None and caller.pid:
        with suppress(ProcessLookupError, FileNotFoundError):
            bounds = read_bounds(caller.pid, caller.start_time, caller.uid)
    if bounds is None and isinstance(request, RestartRequest):
        raise NoSuchTarget('the calling process is gone, so its limits, which apply to the tree, are unknown',
                           phase='plan',
                           hint='call again, and stay until the answer')
    bounds = bounds or Bounds()
    if not isinstance(request, RestartRequest):
        bounds = bounds._replace(old_cgroups=())    # nothing that this worker starts stays
    bounding = caller.bounding if caller.bounding >= 0 else (1 << 64) - 1
    return Identity(caller.uid, caller.gid, tuple(caller.groups), bounding, _kept(request), bounds)


def _kept(request: JobRequest) -> int:
    # root needs no permission
    traces = isinstance(request, CheckpointRequest) and (request.trace_under_yama or not request.caller.uid)
    return _KEPT_CAPABILITIES | (1 << CAP_SYS_PTRACE if traces and ptrace_scope() in (DECLARED, CAPABLE) else 0)


def identity_of_owner(roots: Sequence[int], request: DumpRequest) -> Identity | None:
    """Return the user that the worker of a checkpoint by root becomes: the owner of the tree, if they might trace every
    task of it. None for root's tree, or one of several users.

    A task that the user might not trace has more rights than the user, or had them and has dropped them.
    """
    try:
        root = read_status(roots[0])
    except ProcessLookupError:
        return None         # the checkpoint finds out what has become of it
    uid = root.uids[1]
    if not uid or not _is_all_of(root, uid):
        return None         # nearly always it is root's, so its tree is not scanned for this
    tree = scan_tree(roots)
    for task in tree:
        with suppress(ProcessLookupError):
            if not _is_all_of(read_status(task.tgid, task.tid), uid):
                return None
    answers = probe(Caller(uid, root.gids[1], root.groups, capabilities=0), [task.tid for task in tree])
    if isinstance(answers, int) or any(answer not in (0, errno.ESRCH) for answer in answers):
        return None
    return Identity(uid, root.gids[1], root.groups, capabilities=_kept(request))


def _is_all_of(status: Status, uid: int) -> bool:
    return {*status.uids} == {uid}


def _of_account(uid: int, gid: int) -> Identity:
    """Return a user with the groups from the machine's accounts."""
    with suppress(KeyError):
        account = pwd.getpwuid(uid)
        return Identity(uid, account.pw_gid, tuple(os.getgrouplist(account.pw_name, account.pw_gid)),
                        bounds=Bounds(loginuid=uid))
    return Identity(uid, gid, (), bounds=Bounds(loginuid=uid))


# ---------------------------------------------------------------- the launcher

def become(identity: Identity) -> None:
    """Take the identity in the calling process, of one thread. After an OSError the changes so far remain, so exit."""
    _take_bounds(identity)
    if identity.new_pidns:
        unshare(CLONE_NEWPID)
    for capability in range(last_capability() + 1):
        if not identity.bounding >> capability & 1:
            prctl(PR_CAPBSET_DROP, capability)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    set_keepcaps(True)
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    capset(Capabilities(identity.capabilities, identity.capabilities, 0))
    set_keepcaps(False)
    with suppress(OSError):     # a kernel without keyrings, or a user whose quota is full: the user keyring suffices
        join_new_session_keyring()
    _require(identity)


def _take_bounds(identity: Identity) -> None:
    bounds = identity.bounds
    cgroup1.join(bounds.old_cgroups)        # in v2 the broker moves the tree
    for number, (soft, hard) in enumerate(bounds.limits):
        if number not in _NOT_FOR_THE_WORKER:
            _limit(number, soft, hard)
    with suppress(PermissionError), open('/proc/self/oom_score_adj', 'wb', buffering=0) as file:  # noqa: PTH123
        file.write(str(bounds.oom_score_adj).encode())
    if bounds.nice:
        os.setpriority(os.PRIO_PROCESS, 0, bounds.nice)
    if bounds.loginuid >= 0:
        with suppress(FileNotFoundError, PermissionError), open('/proc/self/loginuid', 'wb', buffering=0) as file:  # noqa: PTH123
            file.write(str(bounds.loginuid).encode())
    os.umask(0o077)
    os.chdir('/')


def _limit(number: int, soft: int, hard: int) -> None:
    """Set the limit of the caller, or the nearest that is possible without CAP_SYS_RESOURCE."""
    most = _unsigned(resource.getrlimit(number)[1])
    hard = min(hard, most)
    if number == resource.RLIMIT_MEMLOCK:
        soft = hard     # a tree that has raised it locks its memory before it has its own limits
    resource.setrlimit(number, (_signed(min(soft, hard)), _signed(hard)))


def _unsigned(value: int) -> int:
    return RLIM_INFINITY if value == resource.RLIM_INFINITY else value


def _signed(value: int) -> int:
    return resource.RLIM_INFINITY if value == RLIM_INFINITY else value


def _require(identity: Identity) -> None:
    """Check in /proc that no right of root is left. CkptError."""
    status = read_status(os.getpid())
    held_ids = (*status.uids, *status.gids)
    wanted = (*(identity.uid,) * 4, *(identity.gid,) * 4)
    capabilities = status.cap_eff, status.cap_prm, status.cap_inh, status.cap_amb
    if (held_ids != wanted or not _same_groups(status.groups, identity)
            or capabilities != (identity.capabilities, identity.capabilities, 0, 0)):
        raise CkptError('the worker keeps rights of root', hint='this is a bug of ckptd: nothing was done')


def _same_groups(groups: Sequence[int], identity: Identity) -> bool:
    return set(groups) == set(identity.groups)
