# SPDX-License-Identifier: LGPL-2.1-or-later
"""User namespaces (user_namespaces(7)): made for an ordinary user, with that uid and gid mapped to themselves."""

import os
from collections.abc import Iterable

from ckptd.errors import Finding, NotSupported
from ckptd.kernel.clone import CLONE_NEWUSER
from ckptd.objects.namespaces.base import BirthNamespaces, NamespaceKind, unshare_stub
from ckptd.objects.support import Support
from ckptd.remote.stub import Stub


class UserNamespace(NamespaceKind, name='user'):
    """A user namespace."""
    support = Support('user', restored='no', refused='another one than that of the restart')
    is_first = True

    def is_made(self, birth: BirthNamespaces) -> bool:
        return birth.user

    def enter(self, birth: BirthNamespaces, bootstrap: Stub) -> Iterable[Finding]:
        if birth.user:
            unshare_stub(bootstrap, CLONE_NEWUSER)
            _map_ids(bootstrap.tid)
        return ()


def _map_ids(pid: int) -> None:
    uid, gid = os.getuid(), os.getgid()
    try:
        _write(f'/proc/{pid}/setgroups', 'deny')        # otherwise only root may map groups (user_namespaces(7))
        _write(f'/proc/{pid}/uid_map', f'{uid} {uid} 1')
        _write(f'/proc/{pid}/gid_map', f'{gid} {gid} 1')
    except OSError as error:
        raise NotSupported(f'cannot make a user namespace: {error.strerror}', errno=error.errno, resource='user',
                           hint='allow user namespaces (user.max_user_namespaces), or run as root') from error


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
