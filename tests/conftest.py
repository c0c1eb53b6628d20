# SPDX-License-Identifier: LGPL-2.1-or-later
"""The gate, the settled check, and the fixtures that every test directory shares."""

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.lib import gate, settled
from tests.lib.brood import Brood
from tests.lib.bus import Daemon, PrivateBus
from tests.lib.victim import Victim


def pytest_configure(config: pytest.Config) -> None:
    # of the unit that the tests run in: a daemon that they start as a service manager does is not that process
    os.environ.pop('SYSTEMD_EXEC_PID', None)
    config.addinivalue_line('markers', 'needs(*names): what the test needs of the machine, names of tests/lib/gate.py')
    config.addinivalue_line('markers', 'heavy: a real program that `make test` leaves out; `make programs` runs it')
    config.addinivalue_line('markers', 'lint: a linter run as a test')
    try:
        gate.required()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header() -> list[str]:
    return [f'missing: {line}' for line in gate.summary()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # what is done at random can be done once more: record_property('seed', ...)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, 'when', '') == 'call':
            for name, value in report.user_properties:
                if name == 'seed':
                    terminalreporter.write_line(f'seed {value}: {report.nodeid}')


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers('needs'):
        reason, failure = gate.verdict(marker.args)
        if failure:
            pytest.fail(reason, pytrace=False)
        if reason:
            pytest.skip(reason)


@pytest.fixture(scope='session', autouse=True)
def test_cgroup() -> Iterator[Path | None]:
    """The cgroup that this worker's tests run in, None where there can be none."""
    settled.become_subreaper()
    with settled.cgroup_of_our_own() as own:
        yield own


@pytest.fixture
def brood() -> Iterator[Brood]:
    """Children that do what they are asked for."""
    with Brood() as running:
        yield running


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    yield
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, f'tasks were left running: {others}'


@pytest.fixture(autouse=True)
def settled_after(request: pytest.FixtureRequest, test_cgroup: Path | None) -> Iterator[None]:
    """Nothing may be left behind: no process, fd, thread, asyncio task or cgroup."""
    if inspect.iscoroutinefunction(getattr(request, 'function', None)):
        request.getfixturevalue('no_task_left')
    before = settled.Picture.take(test_cgroup)
    yield
    left = before.left(test_cgroup)
    if left:
        pytest.fail('the test left things behind:\n' + '\n'.join(left), pytrace=False)


@pytest.fixture
def cgroup(test_cgroup: Path | None, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty cgroup; what is still in it at the end is killed."""
    if test_cgroup is None:
        pytest.skip('needs cgroup2: no cgroup can be made here')
    path = test_cgroup / 'target'
    path.mkdir()
    yield path
    settled.remove_cgroup(path)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """An empty spool directory."""
    path = tmp_path / 'spool'
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def private_bus(tmp_path: Path) -> Iterator[PrivateBus]:
    """A dbus-daemon on a socket of its own."""
    with PrivateBus(tmp_path) as bus:
        yield bus


@pytest.fixture
def daemon(tmp_path: Path, spool: Path) -> Iterator[Daemon]:
    """ckptd with a bus of its own, as --standalone runs it."""
    with Daemon(tmp_path, spool) as running:
        yield running


@pytest.fixture
def start_daemon(tmp_path: Path, spool: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons with an environment or options of the test's own: start_daemon(env={'CKPTD_FAULT': ...})."""
    running: list[Daemon] = []

    def start(*options: str, env: dict[str, str] | None = None) -> Daemon:
        running.append(Daemon(tmp_path, spool, options, env))
        return running[-1].start()

    yield start
    for one in reversed(running):
        one.stop()


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Callable[..., Victim]]:
    """Start victim programs by name; each is ready when this returns: victim('memory', 'anon')."""
    running: list[Victim] = []

    def start(name: str, *args: str, **kwargs: object) -> Victim:
        running.append(Victim(name, *args, directory=tmp_path / f'victim{len(running)}', **kwargs))
        return running[-1].start()

    yield start
    for one in reversed(running):
        one.close()
