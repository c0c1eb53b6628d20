# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that did not come back as they were, each of which does now; and some random ones, the same in each run.

`make random` runs more, and different ones.
"""

import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.bases import user_in
from tests.generated.memory import MAP_GROWSDOWN, MAP_LOCKED, PRIVATE, SHARED
from tests.generated.programs import Operation, programs
from tests.generated.trial import Outcome, Trial
from tests.worker.driver import Place

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]


def do(name: str, /, **arguments: object) -> Operation:
    return Operation(name, dict(arguments))


# what was lost: a program that has it
ONCE_LOST = {
    'nothing': [],
    'a seal of a mapping (mseal)': [
        do('map_anonymous', page=1, length=3, protection=3, flags=0, sharing=PRIVATE),
        do('write_memory', page=1, length=2), do('seal', page=1, length=2)],
    'a name of a mapping that is a path, or of one that grows down': [
        do('map_anonymous', page=1, length=3, protection=3, flags=0, sharing=PRIVATE),
        do('name_memory', page=1, length=1, name=b'/path'),
        do('map_anonymous', page=9, length=3, protection=3, flags=0, sharing=SHARED),
        do('name_memory', page=9, length=1, name=b'/path'),
        do('map_anonymous', page=17, length=3, protection=3, flags=MAP_GROWSDOWN, sharing=PRIVATE),
        do('name_memory', page=17, length=3, name=b'x')],
    'busy polling of an epoll (EPIOCSPARAMS)': [
        do('make_eventfd', value=0, flags=0), do('watch', to=0, events=1, data=1, new=True, instance=0),
        do('set_epoll_parameters', file=1, usecs=100, budget=8, prefer=True)],
    'memory policy and nice value of the autogroup': [
        do('set_policy', policy=2, nodes=1), do('write_proc', name_value=('autogroup', '5')),
        do('fork', inner=[do('lead_group', call='setsid', child=0), do('write_proc', name_value=('autogroup', '7'))])],
    'SS_AUTODISARM of an alternate stack that is disabled': [
        do('set_alternate_stack', flags=0x80000002, address=3, size=2048)],
    'limits above 2**63': [do('set_high_limit', which=1, soft=10**9, files=300)],
    'owner and mode of a socket': [
        do('make_socketpair', kind=1, flags=0), do('change_mode', file=0, mode=0o600, owner=61001),
        do('make_socket', kind=2), do('change_mode', file=2, mode=0o600, owner=61001)],
    'a locked mapping without access': [
        do('map_anonymous', page=1, length=3, protection=0, flags=MAP_LOCKED, sharing=SHARED),
        do('map_anonymous', page=9, length=3, protection=0, flags=MAP_LOCKED, sharing=PRIVATE)],
    'nice value under a real-time policy': [
        do('set_nice', nice=3, who=0), do('set_scheduling', policy=1, flags=0, nice=0, priority=1, runtime=0)],
    'SO_PEERCRED of a socket whose other end is closed': [
        do('make_socketpair', kind=5, flags=0), do('close', file=1)],
    'flags of timerfd_settime(2)': [
        do('make_timerfd', clock=clock, flags=0, setting=3, interval=2, armed=True) for clock in (0, 1, 7)],
    'IPV6_V6ONLY of a datagram socket that is bound to all addresses and connected': [
        do('make_internet_socket', family=10, sort=(2, 0), flags=0),
        do('bind_socket', file=0, family=10, host=1, reuse=0), do('connect_datagrams', file=0, family=10, host=0)],
    'size of a buffer of MPTCP that the kernel has chosen': [
        do('make_internet_socket', family=2, sort=(1, 262), flags=0), do('listen', file=0, backlog=1)],
    'SO_PEERCRED of a datagram socket whose peer is closed': [
        do('make_socketpair', kind=2, flags=0), do('close', file=0)],
    **{f'a connection with a named client whose socket {file} is closed': [
        do('connect_by_name', kind=5, accept=True, client_bound=True), do('close', file=file)] for file in range(3)},
    'mode of a socket that root has made for a user': [
        do('make_socket', kind=1), do('change_mode', file=0, mode=0o600, owner=-1),
        do('set_ids', call='setresuid', real=61001, effective=61001, saved=61001)],
    'a listener that is shut down': [
        do('make_named_socket', kind=1, flags=0, name=b'\0generated-%d', backlog=5, gone=False),
        do('shut_down', file=0, how=2)],
    'a seqpacket socket without a connection that is shut down': [
        do('make_socket', kind=5), do('shut_down', file=0, how=0)],
    'a controlling terminal that nobody has opened': [
        do('make_terminal', flags=0, slave='never', locked=True, orphan=False), do('take_terminal', file=0)],
    'O_DSYNC of a FIFO': [do('open_file', path='fifo', mode=2, flags=os.O_DSYNC)],
    'a symbolic link of /proc': [do('open_path', path='/proc/self', flags=os.O_NOFOLLOW)],
    'flags of a message queue': [do('make_refused', which='queue')],
    'SO_PEERGROUPS': [do('set_groups', groups=[0, 1, 61001]), do('make_socketpair', kind=1, flags=0)],
    'write hint of a file without a name': [
        do('make_nameless', flags=2), do('set_hint', file=0, command=1036, hint=3)],
    'size of a buffer whose lock was taken back (SO_BUF_LOCK)': [
        do('make_socketpair', kind=1, flags=0), do('set_socket_option', file=0, option=7, value=5000),
        do('set_socket_option', file=0, option=72, value=0)],
    'socket options': [
        do('make_socketpair', kind=1, flags=0),
        # SO_NO_CHECK, TIMESTAMPING, WIFI_STATUS, LOCK_FILTER, MAX_PACING_RATE, INCOMING_CPU, BINDTOIFINDEX,
        # PREFER_BUSY_POLL, RCVPRIORITY; and formats of timestamps
        *[do('set_socket_option', file=0, option=option, value=1) for option in (11, 37, 41, 44, 47, 49, 62, 69, 82)],
        *[do('set_socket_option', file=1, option=option, value=2) for option in (63, 65)]],
}


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[[list[Operation]], Outcome]:
    """Run a program once: checkpoint, kill, restore, compare."""
    tmp_path.chmod(0o755)
    place = Place(tmp_path).make()
    return lambda steps: Trial(place, tmp_path / 'trial', steps).run()


ONCE_LOST_BY_USERS = {
    'a System V segment that its owner may only read': [
        do('attach_segment', page=3, length=2, flags=0x1000, mode=0o400)],
    'a System V segment that a personality makes executable': [
        do('set_personality', persona=0x400000), do('attach_segment', page=3, length=2, flags=0x1000, mode=0o600)],
    'PR_SET_KEEPCAPS': [do('set_prctl', arguments=(8, 1))],
}


@pytest.mark.parametrize('lost', sorted(ONCE_LOST_BY_USERS))
def test_once_lost_by_users(tmp_path: Path, lost: str) -> None:
    with user_in(tmp_path) as user:
        outcome = Trial(user.place, user.attacker.home / 'trial', ONCE_LOST_BY_USERS[lost], user).run()
    assert (outcome.what, outcome.wrong) == ('restored', [])


def test_a_file_that_its_user_cannot_open_any_more(tmp_path: Path) -> None:
    with user_in(tmp_path) as user:
        outcome = Trial(user.place, user.attacker.home / 'trial', [
            do('make_file', name='new', flags=0, gone='no', mode=0o200)], user).run()
    assert outcome.wrong == []
    assert outcome.what.startswith('restore refused: Refused')
    assert [re.sub('/.*/', '', one) for one in outcome.warnings] == ['new may not be opened again']


@pytest.mark.parametrize('lost', sorted(ONCE_LOST))
def test_once_lost(attempt: Callable[[list[Operation]], Outcome], lost: str) -> None:
    outcome = attempt(ONCE_LOST[lost])
    assert (outcome.what, outcome.wrong) == ('restored', [])


def test_random_programs(tmp_path: Path) -> None:
    """Some that are the same in each run."""
    tmp_path.chmod(0o755)
    place, numbers = Place(tmp_path).make(), count()

    @settings(max_examples=10, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(programs())
    def is_as_before(steps: list[Operation]) -> None:
        outcome = Trial(place, tmp_path / f'trial-{next(numbers)}', steps).run()
        assert outcome.wrong == [], steps
    is_as_before()


def test_keyrings_are_named(attempt: Callable[[list[Operation]], Outcome]) -> None:
    """No other process can read the keys of a thread or of its process."""
    outcome = attempt([do('add_key', keyring=-1, name=b'user'), do('add_key', keyring=-2, name=b'user')])
    assert (outcome.what, outcome.wrong) == ('restored', [])
    assert 'had a keyring of its thread and its process' in outcome.warnings


def test_a_working_directory_of_its_own_process_is_refused(attempt: Callable[[list[Operation]], Outcome]) -> None:
    outcome = attempt([do('change_directory', path='/proc/self')])
    assert outcome.what.startswith('checkpoint refused: Refused')
    assert 'exists only while that process does' in outcome.what
    assert outcome.wrong == []


def test_echo_of_a_terminal_that_nobody_has_opened(attempt: Callable[[list[Operation]], Outcome]) -> None:
    """The data at its master can only be taken out through the slave, which must stay unopened."""
    outcome = attempt([do('make_terminal', flags=0, slave='never', locked=False, orphan=False),
                       do('write', file=0, size=10)])
    assert outcome.what.startswith('checkpoint refused: Busy what was written to ')
    assert outcome.wrong == []


def test_flags_of_deleted_files_and_fifos_are_named(attempt: Callable[[list[Operation]], Outcome]) -> None:
    outcome = attempt([do('make_file', name='new', flags=os.O_NOFOLLOW, gone='unlink', mode=0o600),
                       do('open_file', path='fifo', mode=2, flags=os.O_NOFOLLOW)])
    assert (outcome.what, outcome.wrong) == ('restored', [])
    assert [re.sub('/.*/', '', one) for one in outcome.warnings] == [
        'O_NOFOLLOW of new is not kept', 'O_NOFOLLOW of fifo is not kept']
