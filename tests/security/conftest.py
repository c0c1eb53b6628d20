# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon of root on a bus with the policy of a system bus, and two ordinary users who want more than is theirs."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.aftermath import idle
from tests.lib.bus import Served
from tests.lib.systembus import USERS, SystemBus
from tests.security.attacker import Attacker
from tests.worker.driver import place_of
from tests.worker.faulty import Gate

GROUP = 61099       # of both users, and of nobody else


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.needs('root', 'dbus', 'unshare', 'ptrace'))


@pytest.fixture(scope='module')
def shared_bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemBus]:
    with SystemBus(tmp_path_factory.mktemp('bus')) as running:
        yield running


@pytest.fixture
def bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SystemBus]:
    """The bus of this test: one of its own where it starts a daemon of its own, for a name has one owner."""
    if 'serve' not in request.fixturenames:
        yield request.getfixturevalue('shared_bus')
        return
    with SystemBus(tmp_path) as running:
        yield running


@contextmanager
def daemon_of(bus: SystemBus, directory: Path, *options: str, spool: Path | None = None, **more: Any
              ) -> Iterator[Served]:
    """ckptd on the bus. What went wrong inside it, whatever it was asked for, is a failure of the test."""
    spool = spool or directory / 'spool'
    spool.mkdir(mode=0o700, exist_ok=True)
    with Served(bus.address, directory, spool, options, **more) as running:
        yield running
        assert running.stop() == 0, running.log
        assert 'Traceback' not in running.log, running.log


@pytest.fixture(scope='module')
def served(shared_bus: SystemBus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The daemon of tests that need nothing special of it."""
    with daemon_of(shared_bus, tmp_path_factory.mktemp('served')) as running:
        yield running


@pytest.fixture(autouse=True)
def workers_end(request: pytest.FixtureRequest) -> Iterator[None]:
    """A worker cleans up and ends a moment after its last word. A test is over when the shared daemon has none."""
    yield
    if 'served' in request.fixturenames:
        idle(request.getfixturevalue('served').pid)


@pytest.fixture
def serve(bus: SystemBus, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a daemon of the test's own, with options, an environment, a module: serve(env={'CKPTD_FAULT': ...})."""
    with ExitStack() as stack:
        yield lambda *options, **more: stack.enter_context(daemon_of(bus, tmp_path, *options, **more))


def _user(name: str, bus: SystemBus) -> Iterator[Attacker]:
    with ExitStack() as stack:
        home = stack.enter_context(place_of(USERS[name]))
        os.chown(home, -1, USERS[name])
        user = Attacker(name, USERS[name], (USERS[name], GROUP), home, bus.address)
        stack.callback(user.close)
        yield user


@pytest.fixture
def attacker(bus: SystemBus) -> Iterator[Attacker]:
    yield from _user('alice', bus)


@pytest.fixture
def other(bus: SystemBus) -> Iterator[Attacker]:
    yield from _user('bob', bus)


@pytest.fixture
def thrifty(bus: SystemBus) -> Iterator[Attacker]:
    """A third user, of whom no other test has processes or pipes."""
    yield from _user('carol', bus)


@pytest.fixture
async def gate() -> Any:
    """Where jobs of a daemon that was started with its environment ask before they go on, whoever does them."""
    gate = Gate()
    gate.path.parent.chmod(0o711)
    gate.path.chmod(0o666)
    yield gate
    gate.close()
