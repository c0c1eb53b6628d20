# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bindings that a foreign generator (jeepney.bindgen) makes of the introspection data drive the daemon."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from jeepney import MatchRule, Properties, message_bus
from jeepney.io.blocking import DBusConnection, Proxy, open_dbus_connection
from jeepney.wrappers import DBusErrorResponse

from ckptd.bus.interfaces import INTERFACES
from ckptd.bus.names import BUS_NAME, IMAGE, JOB, MANAGER, ROOT
from tests.daemon.conftest import start_sleeper
from tests.lib.bus import ROOT as CHECKOUT
from tests.lib.bus import Daemon

pytestmark = pytest.mark.needs('dbus')
NO_OPTIONS: dict[str, tuple[str, Any]] = {}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate(output: Path, *arguments: str) -> ModuleType:
    done = subprocess.run([sys.executable, '-m', 'jeepney.bindgen', '--name', BUS_NAME, '--output', str(output),
                           *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return load(output)


@pytest.fixture
def generated(tmp_path: Path) -> SimpleNamespace:
    """The classes Manager, Job and Image, of the files in dbus/."""
    modules = {name: generate(tmp_path / f'{name}.py', '--file', str(CHECKOUT / 'dbus' / f'org.ckptd1.{name}.xml'),
                              '--path', ROOT) for name in ('Manager', 'Job', 'Image')}
    return SimpleNamespace(**{name: getattr(module, name) for name, module in modules.items()})


class Driver:
    """A blocking connection, and the generated classes on it."""

    def __init__(self, connection: DBusConnection, generated: SimpleNamespace) -> None:
        self.connection, self.generated = connection, generated
        self.manager = Proxy(generated.Manager(), connection)

    def property_(self, path: str, interface: str, name: str) -> Any:
        proxy = Proxy(Properties(SimpleNamespace(object_path=path, bus_name=BUS_NAME, interface=interface)),
                      self.connection)
        return proxy.get(name)[0][1]

    @contextlib.contextmanager
    def job_removed(self) -> Iterator[Any]:
        """A queue of JobRemoved from now on."""
        rule = MatchRule(type='signal', interface=MANAGER, member='JobRemoved', path=ROOT)
        Proxy(message_bus, self.connection).AddMatch(rule)
        with self.connection.filter(rule, bufsize=10) as queue:
            yield queue

    def run(self, method: str, *args: Any) -> str:
        """Call a method that starts a job, wait for its end: its path."""
        with self.job_removed() as queue:
            [path] = getattr(self.manager, method)(*args)
            while (body := self.connection.recv_until_filtered(queue, timeout=30).body)[1] != path:
                pass
        assert body[2] == 'done', self.property_(path, JOB, 'Error')
        return path


@pytest.fixture
def driver(daemon: Daemon, generated: SimpleNamespace) -> Iterator[Driver]:
    with open_dbus_connection(daemon.address, auth_timeout=10) as connection:
        yield Driver(connection, generated)


def test_every_method_is_generated(generated: SimpleNamespace) -> None:
    for exported in INTERFACES:
        cls = getattr(generated, exported.interface.rpartition('.')[2])
        assert set(exported.table.methods) <= set(vars(cls))


def test_a_checkpoint_and_its_image(driver: Driver, sleeper: str) -> None:
    assert driver.manager.ListImages() == ([],)
    [refusals] = driver.manager.Check(sleeper, NO_OPTIONS)
    assert all(row['severity'] == ('s', 'warning') for row in refusals)
    path = driver.run('Checkpoint', sleeper, {'after': ('s', 'resume'), 'timeout': ('t', 5_000_000)})
    assert driver.property_(path, JOB, 'State') == 'done'
    assert driver.property_(path, JOB, 'Result')['tasks'] == ('u', 1)
    [[row]] = driver.manager.ListImages()
    assert row['image'][1] == driver.property_(path, JOB, 'Image')
    image = Proxy(driver.generated.Image(object_path=row['path'][1]), driver.connection)
    assert image.Verify() == ([],)
    [[task]] = image.Tree()
    assert task['comm'] == ('s', 'sleep')
    assert driver.property_(row['path'][1], IMAGE, 'Statistics')['frozen_time'] > 0
    image.Remove()
    assert driver.property_(ROOT, MANAGER, 'Images') == 0


@pytest.mark.needs('root', 'ptrace')
def test_a_restore(driver: Driver) -> None:
    with start_sleeper() as process:
        path = driver.run('Checkpoint', f'pid:{process.pid}', {'after': ('s', 'kill')})
    image = driver.property_(path, JOB, 'Image')
    job = driver.run('Restore', image, {'changed_files': ('s', 'accept'), 'wait': ('b', False)})
    assert driver.property_(job, JOB, 'Root') == process.pid
    pidfd = os.pidfd_open(process.pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def test_an_error_has_its_name_and_details(driver: Driver) -> None:
    with pytest.raises(DBusErrorResponse) as caught:
        driver.manager.Checkpoint('pid:4194305', NO_OPTIONS)
    assert caught.value.name == 'org.ckptd1.Error.NoSuchTarget'
    assert caught.value.data[1]['errno'] == ('s', 'ESRCH')


def test_of_live_introspection(daemon: Daemon, tmp_path: Path) -> None:
    module = generate(tmp_path / 'live.py', '--bus', daemon.address, '--path', ROOT)
    with open_dbus_connection(daemon.address, auth_timeout=10) as connection:
        assert Proxy(module.Manager(), connection).ListJobs() == ([],)
