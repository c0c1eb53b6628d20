# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon ckptd. It wires bus, queue and spool together and contains no policy.

    start   spool and runtime directory, bus, thaw what an earlier daemon left, export, own the name, READY=1
    stop    STOPPING=1, cancel jobs, thaw trees, end workers, leave the bus; on SIGTERM, SIGINT, or when the bus is gone
"""

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd import __version__, config, logs
from ckptd.bus.announce import Announcer
from ckptd.bus.authorizer import Authorizer
from ckptd.bus.client import Client
from ckptd.bus.connection import DRIVER, Connection
from ckptd.bus.listeners import find_again, keep
from ckptd.bus.manager import ManagerObject
from ckptd.bus.message import DBusError
from ckptd.bus.names import BUS_NAME, NODES, ROOT
from ckptd.bus.polkit import Polkit
from ckptd.bus.private import private_bus
from ckptd.bus.router import Router
from ckptd.bus.systemd import Systemd
from ckptd.errors import CkptError, Unavailable
from ckptd.jobs import audit
from ckptd.jobs.images import ImageService
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.queue import Queue
from ckptd.jobs.quota import Quota
from ckptd.jobs.recovery import Recovery
from ckptd.jobs.requests import RequestFactory
from ckptd.jobs.spool import Spool
from ckptd.jobs.visibility import Visibility
from ckptd.jobs.watch import SpoolWatch
from ckptd.kernel.closing import abort_all, report_to
from ckptd.kernel.confinement import own_restrictions
from ckptd.notify import ServiceManager
from ckptd.places import Places, prepare_runtime

log = logging.getLogger('ckptd.daemon')     # the name stays when the module runs as __main__

LAST_CALLS = 10.0       # seconds for calls that arrived before the name was released; callers of the next daemon wait
                        # 25 s

EPILOG = """example:
  ckptd --private --spool /tmp/images --verbose

Without a bus option ckptd serves the system bus if root starts it, else the session bus."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that a daemon is started with."""
    bus: str    # 'system', 'session', an address; '' for a private bus that the daemon starts itself
    config: config.Config
    spool: Path
    runtime: Path
    parent: int = 0            # process that started a daemon with a private bus, which ends with that process; 0 for
                               # none
    idle_exit: bool = False    # the daemon may exit when idle, because the bus starts it again


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser('ckptd', description='Checkpoint running process trees, over D-Bus.',
                                     epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    bus = parser.add_mutually_exclusive_group()
    bus.add_argument('--address', metavar='ADDR', help='serve the bus at this D-Bus address')
    bus.add_argument('--system', action='store_true', help='serve the system bus')
    bus.add_argument('--user', action='store_true', help='serve the session bus')
    bus.add_argument('--private', action='store_true', help='start a private bus, print "DBUS_ADDRESS=..." when '
                     'ready, and end when the process that started ckptd ends')
    parser.add_argument('--spool', metavar='DIR', type=Path, help='directory of images')
    parser.add_argument('--config', metavar='FILE', type=Path, help='configuration, instead of /etc/ckptd/ckptd.conf')
    parser.add_argument('--runtime', metavar='DIR', type=Path, help='directory of the freeze journal')
    parser.add_argument('--verbose', action='store_true', help='log informational messages, not only problems')
    parser.add_argument('--version', action='version', version=f'ckptd {__version__}')
    return parser.parse_args(argv)


def make_settings(options: argparse.Namespace) -> Settings:
    """Combine settings: arguments win over the configuration, and that over the defaults of the system or the user."""
    system = not options.user and os.geteuid() == 0
    conf = config.load(options.config, system)
    spool, runtime = options.spool or conf.spool, options.runtime
    if spool is None or runtime is None:
        places = Places.of(system, runtime)
        spool, runtime = spool or places.spool, places.runtime
    bus = options.address or ('' if options.private else 'system' if options.system or system else 'session')
    return Settings(bus, conf, spool.absolute(), runtime.absolute(), os.getppid() if options.private else 0,
                    bus in ('system', 'session'))


class Daemon:
    """One daemon, from the start of `run` to its end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._kept = False      # the listeners are saved for the next daemon
        self._starter = ServiceManager.take(private=not settings.bus)
        self._spool = Spool(settings.spool)
        self._address = settings.bus
        self._stack = contextlib.AsyncExitStack()
        # the bus whose systemd manages the units that this daemon may manage
        self._own_bus = 'system' if os.geteuid() == 0 else 'session'

    async def run(self) -> None:
        """Serve until told to stop. CkptError if the daemon cannot start, Unavailable if the bus goes away."""
        async with self._stack:
            _take_all_fds()
            await asyncio.to_thread(self._prepare)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._stop.set)
            if self._settings.parent > 1:
                self._follow(self._settings.parent)
            self._address, avoid = await self._find_bus()
            connection = await self._stack.enter_async_context(await Connection.open(self._address))
            queue = await self._export(connection, avoid)
            try:
                await self._serve(connection, queue)
            finally:
                self._starter.notify('STOPPING=1')
                await queue.stop()
                await self._keep_listeners(connection)
                audit.flush()

    async def _keep_listeners(self, connection: Connection) -> None:
        if not self._kept:
            self._kept = True
            await keep(self._settings.runtime, connection, self._router)

    def _prepare(self) -> None:
        self._spool.prepare()
        prepare_runtime(self._settings.runtime)
        self._spool.adopt(self._spool.look())

    async def _find_bus(self) -> tuple[str, tuple[int, ...]]:
        """Return the address to connect to, and the processes that this daemon needs to keep running."""
        if self._settings.bus:
            return self._settings.bus, (os.getpid(),)
        bus = await self._stack.enter_async_context(private_bus())
        return bus.address, (os.getpid(), bus.pid)

    async def _export(self, connection: Connection, avoid: tuple[int, ...]) -> Queue:
        """Export all objects. This comes before the name is taken, because the caller that activated ckptd is
        waiting."""
        settings = self._settings
        units = await self._find_systemd()
        avoid = (*avoid, *await self._pid_of_bus(connection))      # a frozen bus carries no Thaw
        announcer = Announcer(self._spool)
        # A daemon that systemd starts has a sandbox, and its stop ends all its children. So a restart needs a unit of
        # its own.
        pool = WorkerPool(services=units if settings.bus == self._own_bus else None)
        recovery = Recovery(settings.runtime, self._spool, units, pool)
        quota = Quota(settings.config, self._spool)
        queue = Queue(settings.config, pool, recovery, units, announcer, quota)
        request_factory = RequestFactory(settings.config, self._spool, quota, settings.runtime, avoid, settings.parent,
                                         units is not None, connection.inode)
        image_service = ImageService(self._spool, queue, request_factory)
        polkit = Polkit(connection)
        authorizer = Authorizer(polkit, self._spool, Visibility(queue, request_factory))
        router = self._router = Router(connection, queue.spawn, ROOT, authorizer.sees_all, NODES)
        # a private bus: callers count as confined only by what confines more than this daemon
        if not settings.bus:
            router.peers.set_base(own_restrictions())
        polkit.on_changed = router.views_changed
        self._stack.callback(router.peers.close)
        announcer.begin(router, ManagerObject(queue, request_factory, image_service, authorizer), queue, image_service,
                        authorizer)

        def look() -> None:
            queue.spawn(announcer.images_changed(), name='look into the spool')

        self._stack.enter_context(SpoolWatch(settings.spool, look))
        await queue.start()
        return queue

    @staticmethod
    async def _pid_of_bus(connection: Connection) -> list[int]:
        """Return the pid of the bus's process, or nothing if the bus does not tell."""
        try:
            return await connection.driver('GetConnectionUnixProcessID', 's', DRIVER)
        except DBusError as error:
            log.info('the pid of the bus is unknown: %s', error.message)
            return []

    async def _find_systemd(self) -> Systemd | None:
        """Return the manager of the units that this daemon may be asked about, or None if none runs.

        It gets a connection of its own, so that a unit can be thawed however many other calls wait for replies on ours.
        """
        try:
            connection = await self._stack.enter_async_context(await Connection.open(self._own_bus))
        except Unavailable as error:
            log.info('no systemd on the bus: %s', error)
            return None
        systemd = Systemd(Client(connection))
        return systemd if await systemd.is_there() else None

    async def _serve(self, connection: Connection, queue: Queue) -> None:
        await find_again(self._settings.runtime, connection, self._router)
        await connection.request_name(BUS_NAME)
        if not self._settings.bus:
            print(f'DBUS_ADDRESS={self._address}', flush=True)
        self._starter.notify('READY=1', f'STATUS=Images in {self._settings.spool}')
        self._feed_watchdog(self._starter.watchdog)
        log.info('ready: %s, images in %s', BUS_NAME, self._settings.spool)
        connection.on_lost.append(self._stop.set)
        await self._until_idle(queue)
        if not self._stop.is_set():
            await self._leave(connection, queue)
        if not connection.connected:
            raise Unavailable(f'the bus is gone: {connection.error or "it closed the connection"}',
                              hint='start the bus, then ckptd')

    async def _until_idle(self, queue: Queue) -> None:
        """Return when it is time to stop, or when ckptd has been idle for as long as the configuration says."""
        limit = self._settings.config.idle_exit_usec
        patience = limit / 1e6 if self._settings.idle_exit and limit != config.INFINITY else None
        while True:
            since = self._router.last_call
            wait = None if patience is None else max(0.1, since + patience - self._loop.time())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait)
            if self._stop.is_set():
                return
            if not queue.idle or self._router.in_flight:
                self._router.last_call = self._loop.time()
            elif self._router.last_call == since:
                return

    async def _leave(self, connection: Connection, queue: Queue) -> None:
        """Release the name and serve the calls that arrived before. The next call activates the next daemon.

        systemd is told first, then the bus. Otherwise systemd would see a unit that runs without its name, and a caller
        that activates it would wait in vain. A unit that systemd knows to be stopping is started again afterwards
        (systemd's src/shared/bus-util.c, bus_event_loop_with_idle). STOPPING=1 cannot be taken back, so from here on
        calls whose work would outlast them are refused.
        """
        log.info('idle: exiting; the bus starts ckptd again for the next call')
        queue.close()
        self._starter.notify('STOPPING=1')
        await self._keep_listeners(connection)      # The next daemon may begin before this one ends.
        with contextlib.suppress(TimeoutError, DBusError):      # DBusError: the bus is gone
            await connection.release_name(BUS_NAME)
            async with asyncio.timeout(LAST_CALLS):
                await self._router.quiet()

    def _feed_watchdog(self, interval: float | None) -> None:
        # The loop itself feeds the watchdog, so a daemon whose loop hangs is not fed.
        if interval is not None:
            self._starter.notify('WATCHDOG=1')
            self._loop.call_later(interval, self._feed_watchdog, interval)

    def _follow(self, parent: int) -> None:
        """Stop when the process that started this daemon ends, for whatever reason: only that process knows our bus."""
        try:
            pidfd = os.pidfd_open(parent)
        except ProcessLookupError:
            self._stop.set()
            return
        self._stack.callback(os.close, pidfd)
        self._stack.callback(self._loop.remove_reader, pidfd)
        self._loop.add_reader(pidfd, self._stop.set)


def _take_all_fds() -> None:
    """Raise the soft limit of open files to the hard limit. The soft limit exists for programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon. Return 0 after an orderly stop, else the error's exit status after printing the error and its
    hint."""
    options = parse_arguments(argv)
    logs.setup(options.verbose)

    async def run() -> None:
        await Daemon(make_settings(options)).run()

    report_to(lambda aborted: log.warning('%s', aborted))
    try:
        asyncio.run(run())
    except CkptError as error:
        print(f'ckptd: {error.message}' + (f' ({error.hint})' if error.hint else ''), file=sys.stderr)
        return error.exit_status
    finally:
        abort_all()     # exit closes open files, too, and a close that waits for a file system would block it for ever
    return 0


if __name__ == '__main__':
    sys.exit(main())
