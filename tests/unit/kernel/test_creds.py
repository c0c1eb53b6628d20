# SPDX-License-Identifier: LGPL-2.1-or-later
"""Capabilities, and taking another user's credentials."""

import os
from collections.abc import Callable

import pytest

from ckptd.kernel.creds import (
    CAP_DAC_READ_SEARCH,
    CAP_KILL,
    CAP_SETUID,
    CAP_SYS_PTRACE,
    Capabilities,
    become,
    capget,
    capset,
)
from ckptd.kernel.status import read_status

NOBODY = 65534


def test_our_own_as_status_has_them() -> None:
    status = read_status(os.getpid())
    assert capget() == capget(os.getpid()) == (status.cap_eff, status.cap_prm, status.cap_inh)


def test_unknown_capabilities_are_not_all() -> None:
    with pytest.raises(ValueError, match='mask'):
        become(os.getuid(), os.getgid(), [], -1)


def test_to_oneself_needs_no_right(forked: Callable[..., int]) -> None:
    uid, gid, groups = os.getuid(), os.getgid(), os.getgroups()
    status = read_status(forked(lambda: become(uid, gid, groups, 0)))
    assert (status.uids, status.gids, set(status.groups)) == ((uid,) * 4, (gid,) * 4, set(groups))
    assert status.cap_eff == status.cap_prm == status.cap_inh == status.cap_amb == 0


@pytest.mark.needs('root')
@pytest.mark.parametrize('mask', [0, 1 << CAP_SYS_PTRACE, 1 << CAP_KILL | 1 << CAP_DAC_READ_SEARCH])
def test_to_another_user(mask: int, forked: Callable[..., int]) -> None:
    status = read_status(forked(lambda: become(NOBODY, NOBODY - 1, [4, 24], mask)))
    assert (status.uids, status.gids, status.groups) == ((NOBODY,) * 4, (NOBODY - 1,) * 4, (4, 24))
    assert status.cap_eff == status.cap_prm == mask & capget().permitted
    assert status.cap_inh == status.cap_amb == 0


@pytest.mark.needs('root')
def test_root_without_capabilities_stays_root(forked: Callable[..., int]) -> None:
    status = read_status(forked(lambda: become(0, 0, [], 1 << CAP_KILL)))
    assert (status.uids[0], status.cap_eff) == (0, 1 << CAP_KILL)


@pytest.mark.needs('root')
def test_there_is_no_way_back(forked: Callable[..., int]) -> None:
    def setup() -> None:
        become(NOBODY, NOBODY, [], 0)
        for again in (lambda: become(0, 0, [], 0), lambda: capset(Capabilities(1 << CAP_SETUID, 1 << CAP_SETUID, 0))):
            try:
                again()
            except PermissionError:
                continue
            os._exit(2)
    assert read_status(forked(setup)).uids[0] == NOBODY


@pytest.mark.needs('root')
def test_more_than_the_caller_has_is_not_given(forked: Callable[..., int]) -> None:
    def setup() -> None:
        own = capget()
        capset(Capabilities(own.effective, own.permitted & ~(1 << CAP_SYS_PTRACE), 0)._replace(
            effective=own.effective & ~(1 << CAP_SYS_PTRACE)))
        become(NOBODY, NOBODY, [], 1 << CAP_SYS_PTRACE | 1 << CAP_KILL)
    assert read_status(forked(setup)).cap_eff == 1 << CAP_KILL
