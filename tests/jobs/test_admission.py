# SPDX-License-Identifier: LGPL-2.1-or-later
"""Targets and limits: what joins the queue, and under which name."""

import os
import subprocess
from pathlib import Path

import pytest

from ckptd.config import Config, Percent
from ckptd.errors import Busy, LimitsExceeded, NoSuchTarget
from ckptd.jobs.admission import refuse_conflict
from ckptd.jobs.overlap import Relations, overlap
from ckptd.jobs.quota import Quota
from ckptd.jobs.requests import RequestFactory, command_of, target_for
from ckptd.jobs.spool import Spool, SpooledImage
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2
from ckptd.kernel.units import units_of
from ckptd.protocol.requests import Caller, RestoreRequest
from ckptd.target import CALLER, CgroupTarget, ProcessTarget, UnitTarget
from ckptd.tree import TaskId
from tests.jobs.conftest import request_of

ME = Caller(1000, 1000, pid=4242)
A_SERVICE = UnitTarget('a.service')


def test_the_caller_is_a_process() -> None:
    assert target_for(CALLER, ME) == ProcessTarget(4242)
    assert target_for(A_SERVICE, ME) == A_SERVICE


def test_self_needs_a_pid() -> None:
    with pytest.raises(NoSuchTarget):
        target_for(CALLER, Caller(0, 0))


def test_the_name_in_an_image_id() -> None:
    for target, name in ((UnitTarget('nginx.service'), 'nginx'), (CgroupTarget('/a/job-7'), 'job-7'),
                         (CgroupTarget('/'), '')):
        assert command_of(target) == name
    with pytest.raises(NoSuchTarget, match='no process'):
        command_of(ProcessTarget(4194305))


@pytest.mark.parametrize(('operation', 'after', 'busy'), [
    ('checkpoint', 'resume', False), ('checkpoint', 'kill', False), ('checkpoint', 'freeze', True),
    ('freeze', '', True), ('scan', '', False),
])
def test_what_may_be_done_to_a_held_tree(operation: str, after: str, busy: bool) -> None:
    request = request_of('a', operation, **({'after': after} if after else {}))
    try:
        refuse_conflict(request, [], {request.target: 0}, overlap)
    except Busy:
        assert busy
    else:
        assert not busy


@pytest.mark.parametrize(('uid', 'named'), [(0, True), (1000, True), (1001, False)])
def test_what_is_held_is_named_to_its_owner_and_to_root(uid: int, named: bool) -> None:
    with pytest.raises(Busy, match='is held frozen already') as caught:
        refuse_conflict(request_of('a/b', 'freeze', uid), [], {CgroupTarget('/a'): 1000}, overlap)
    words = f'{caught.value.message} {caught.value.hint} '
    assert ('cgroup:/a ' in words) == named


def test_trees_that_share_tasks() -> None:
    """This process, its child, and their cgroups."""
    with subprocess.Popen(['sleep', '1000']) as child:
        try:
            me, it = ProcessTarget(os.getpid()), ProcessTarget(child.pid)
            home, top = CgroupTarget(read_cgroup2(child.pid)), CgroupTarget('/')
            units = units_of(home.path, os.geteuid())
            unit = UnitTarget(units[-1]) if units else A_SERVICE
            for one, other in ((me, it), (it, it), (home, it), (top, home), (top, it), (A_SERVICE, A_SERVICE),
                               (unit, it if units else unit), (CgroupTarget('/x.slice/a.service/y'), A_SERVICE)):
                assert overlap(one, other)
                assert overlap(other, one)
            for one, other in ((ProcessTarget(4194305), it), (CgroupTarget('/none'), it),
                               (CgroupTarget('/a'), CgroupTarget('/ab')), (A_SERVICE, it), (ProcessTarget(2), it),
                               (A_SERVICE, UnitTarget('c.service')),
                               (CgroupTarget('/x.slice/c.service/a.service'), A_SERVICE)):
                assert not overlap(one, other)
                assert not overlap(other, one)
        finally:
            child.kill()


@pytest.mark.parametrize('later', [0, 1])
def test_a_number_that_is_another_process_now(later: int) -> None:
    """Of a parent that has ended since."""
    me, it = TaskId(os.getpid(), read_stat(os.getpid()).start_time - later), TaskId(4194305, 1)
    relations = Relations({ProcessTarget(4194305): (it, me)})
    assert relations.overlap(ProcessTarget(4194305), ProcessTarget(me.tid)) == (not later)


def request_factory(spool: Spool, **settings: object) -> RequestFactory:
    config = Config(**settings)
    return RequestFactory(config, spool, Quota(config, spool), Path('/run/x'), (5, 6), 4242, systemd=True)


def test_a_request_has_what_the_worker_needs() -> None:
    request = request_factory(Spool(Path('/spool'))).checkpoint(A_SERVICE, ME, freeze='unit', timeout=7)
    assert (request.spool, request.runtime, request.freeze, request.timeout_usec) == ('/spool', '/run/x', 'unit', 7)
    assert request.systemd
    assert '_a_' in request.image
    # the daemon, its bus, and the client that waits for it alone
    assert request.avoid == (5, 6, 4242)
    other = request_factory(Spool(Path('/spool'))).check(A_SERVICE, Caller(1000, 1000, pid=1))
    assert (other.avoid, other.timeout_usec, other.image_id) == ((5, 6), 10_000_000, '')


def test_what_a_user_leaves_free() -> None:
    spool = Spool(Path('/spool'))
    spool.capacity = 1000
    for uid, keep_free in ((1000, 50), (0, 0)):
        made = request_factory(spool, keep_free=Percent(5))
        assert made.checkpoint(A_SERVICE, Caller(uid, uid)).keep_free == keep_free
        assert made.on_stream(Caller(uid, uid)).keep_free == keep_free
        image = SpooledImage('20240131_235959_a_0001', Path('/spool/20240131_235959_a_0001'), owner=uid)
        assert made.on_image(RestoreRequest, image, Caller(uid, uid)).keep_free == keep_free


@pytest.mark.parametrize('settings', [{'max_images_per_user': 2}, {'max_bytes_per_user': 30}])
def test_a_full_share_of_the_spool(settings: dict[str, int]) -> None:
    spool = Spool(Path('/spool'))
    ids = ['20240131_235959_a_0001', '20240131_235959_a_0002']
    spool.adopt({name: SpooledImage(name, Path('/spool') / name, owner=1000, size=20) for name in ids})
    with pytest.raises(LimitsExceeded, match='has 2 images of 40 bytes'):
        request_factory(spool, **settings).checkpoint(A_SERVICE, ME)
    for caller in (Caller(0, 0), Caller(1001, 1001)):
        request_factory(spool, **settings).checkpoint(A_SERVICE, caller)
    request_factory(spool, **settings).check(A_SERVICE, ME)
