# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real polkitd on a bus of ours, with actions, rules, users and authentication agents of ours.

    with SystemBus(tmp_path) as bus, Polkit(bus, rules=js) as polkit:
        alice = polkit.user('alice')
        with alice.process() as pid:
            verdict = await polkit.check(pid, 'org.ckptd1.freeze-own')
        with alice.call(BUS_NAME, ROOT, MANAGER, 'Freeze', 'sa{sv}', 'pid:1', '0') as call:
            async with polkit.agent(call.pid, says_yes=False) as agent:
                assert 'dismissed' in await asyncio.to_thread(call.answer)
            assert agent.asked == ['org.ckptd1.freeze']

polkitd reads its files at fixed places, so it lives in a mount namespace of its own, where the places are:

    /usr/share/polkit-1/actions     those of the machine, below them dbus/org.ckptd1.policy
    /etc/polkit-1/rules.d           one file, the test's, before /usr/share/polkit-1/rules.d of the machine
    /etc/passwd, /etc/group         those of the machine, and USERS
    /run                            nobody is logged in: the defaults that count are those of allow_any
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ckptd.bus.call import Call
from ckptd.bus.client import Client, connect
from ckptd.bus.connection import Connection
from ckptd.bus.export import Exported, method
from ckptd.bus.message import DBusError
from ckptd.bus.router import Router
from tests.lib.bus import ROOT, PrivateBus, terminate
from tests.lib.systembus import PASSWD, PATIENCE, USERS, Listener, User, in_own_mounts, start_time, write_users

NAME = 'org.freedesktop.PolicyKit1'
PATH = '/org/freedesktop/PolicyKit1/Authority'
AUTHORITY = 'org.freedesktop.PolicyKit1.Authority'
ERROR = 'org.freedesktop.PolicyKit1.Error.'
AGENT_PATH = '/org/ckptd1/test/agent'
INTERACTION = 1         # CheckAuthorization, flags: AllowUserInteraction

VERBS = ('checkpoint', 'restore', 'freeze')
OWN_ACTIONS = (*(f'org.ckptd1.{verb}-own' for verb in VERBS), 'org.ckptd1.manage-own-images')
OTHER_ACTIONS = (*(f'org.ckptd1.{verb}' for verb in VERBS), 'org.ckptd1.manage-images', 'org.ckptd1.leave-confinement',
                 'org.ckptd1.trace-under-yama')
POLICY = ROOT / 'dbus/org.ckptd1.policy'
POLICY_HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE policyconfig PUBLIC "-//freedesktop//DTD PolicyKit Policy Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/PolicyKit/1/policyconfig.dtd">
"""
ACTION = """<action id="{}"><description>{}</description><message>Who are you?</message><defaults>
 <allow_any>{}</allow_any><allow_inactive>{}</allow_inactive><allow_active>{}</allow_active></defaults></action>
"""
MOUNTS = PASSWD + """cd "$USERS"
mount -t overlay -o "lowerdir=$PWD/actions:/usr/share/polkit-1/actions" none /usr/share/polkit-1/actions
mount --bind rules /etc/polkit-1/rules.d
mount -t tmpfs none /run
mkdir -p /run/systemd/seats /run/systemd/sessions /run/systemd/users /run/systemd/machines
exec "$@" """
# without --no-debug it says when it is there and when it has read its rules
POLKITD = next((path for path in ('/usr/lib/polkit-1/polkitd', '/usr/libexec/polkitd') if Path(path).exists()), '')
READY = 'Acquired the name'
LOADED = 'Finished loading, compiling and executing'


def project_policy() -> str:
    """The actions of this project; as they are planned, until the file is there."""
    if POLICY.exists():
        return POLICY.read_text()
    own = [ACTION.format(name, name, 'yes', 'yes', 'yes') for name in OWN_ACTIONS]
    others = [ACTION.format(name, name, 'auth_admin', 'auth_admin', 'auth_admin_keep') for name in OTHER_ACTIONS]
    return POLICY_HEAD + '<policyconfig>\n' + ''.join(own + others) + '</policyconfig>\n'


@dataclass(frozen=True)
class Verdict:
    """What CheckAuthorization answers. challenge: yes, if somebody had authenticated."""
    authorized: bool
    challenge: bool
    details: dict[str, str]

    @property
    def dismissed(self) -> bool:
        return 'polkit.dismissed' in self.details


def subject_of(pid: int) -> tuple[str, dict[str, Any]]:
    """A process, as polkit names it: unix-process."""
    return 'unix-process', {'pid': pid, 'start-time': start_time(pid), 'uid': Path(f'/proc/{pid}').stat().st_uid}


SUBJECT_TYPES = {'pid': 'u', 'start-time': 't', 'uid': 'i'}


class Polkit:
    """polkitd. Needs root."""

    def __init__(self, bus: PrivateBus, rules: str = '') -> None:
        self.bus = bus
        self._rules = rules
        # short, and everybody may pass: polkitd becomes another user before it reads
        self._home = Path(tempfile.mkdtemp(prefix='ckptd-polkit-'))
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: Listener | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        assert self._listener is not None
        return self._listener.text

    def __enter__(self) -> Self:
        self._home.chmod(0o711)
        self._write_files()
        self._process = subprocess.Popen(
            in_own_mounts(MOUNTS, POLKITD), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, 'DBUS_SYSTEM_BUS_ADDRESS': self.bus.address, 'USERS': str(self._home)})
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        self._listener = Listener(lambda: os.read(output, 1 << 16))
        try:
            self._listener.wait(READY)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._listener is not None
        terminate(self._process)
        self._listener.join()
        self._process.stdout.close()
        shutil.rmtree(self._home)

    def _write_files(self) -> None:
        for name in ('actions', 'rules'):
            (self._home / name).mkdir(mode=0o755)
        (self._home / 'actions/org.ckptd1.policy').write_text(project_policy())
        (self._home / 'rules/00-test.rules').write_text(self._rules)
        write_users(self._home)

    def set_rules(self, rules: str) -> None:
        """Replace the rules; in force when this returns."""
        times = self.log.count(LOADED)
        new = self._home / 'rules.new'
        new.write_text(rules)
        new.rename(self._home / 'rules/00-test.rules')
        assert self._listener is not None
        self._listener.wait(LOADED, times + 1)

    def user(self, name: str) -> User:
        """One of USERS on this bus."""
        return User(self.bus, name, USERS[name])

    async def check(self, pid: int, action: str, *, interactive: bool = False) -> Verdict:
        """CheckAuthorization of a process, asked by root."""
        async with await connect(self.bus.address) as client:
            return await check(client, pid, action, interactive=interactive)

    @contextlib.asynccontextmanager
    async def agent(self, pid: int, *, says_yes: bool | None = True) -> AsyncIterator['Agent']:
        """An authentication agent for one process, in the loop of the test, which answers as root or is dismissed;
        None: it says nothing until it is not asked any more."""
        tasks: set[asyncio.Task[None]] = set()

        def spawn(coro: Coroutine[Any, Any, None], *, name: str | None = None) -> 'asyncio.Task[None]':
            task = asyncio.create_task(coro, name=name)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            return task

        async with await Connection.open(self.bus.address) as connection:
            client, agent = Client(connection), Agent(connection, says_yes)
            router = Router(connection, spawn, '/')
            router.export(AGENT_PATH, agent)
            subject = subject_of(pid)
            await client.call(NAME, PATH, AUTHORITY, 'RegisterAuthenticationAgent', '(sa{sv})ss', subject, 'C',
                              AGENT_PATH, types=SUBJECT_TYPES)
            try:
                yield agent
            finally:
                await asyncio.gather(*tasks)
                router.peers.close()


async def check(client: Client, pid: int, action: str, *, interactive: bool = False) -> Verdict:
    """CheckAuthorization of a process on a connection of root's."""
    return Verdict(*await client.call(
        NAME, PATH, AUTHORITY, 'CheckAuthorization', '(sa{sv})sa{ss}us', subject_of(pid), action, {},
        INTERACTION if interactive else 0, '', types=SUBJECT_TYPES))


class Agent(Exported):
    """asked: the actions that somebody was to authenticate for. cancelled: how often polkit lost interest. changed: one
    of them has. meanwhile: what somebody does before he answers."""
    interface = 'org.freedesktop.PolicyKit1.AuthenticationAgent'

    def __init__(self, connection: Connection, says_yes: bool | None) -> None:
        self.asked: list[str] = []
        self.cancelled = 0
        self.changed = asyncio.Event()
        self.meanwhile: Callable[[], object] | None = None
        self._client, self._says_yes = Client(connection), says_yes
        self._silent: dict[str, asyncio.Event] = {}     # by cookie: until polkit has lost interest

    @method('sssa{ss}sa(sa{sv})', names=('action_id', 'message', 'icon_name', 'details', 'cookie', 'identities'))
    async def BeginAuthentication(self, call: Call, action_id: str, message: str, icon_name: str,
                                  details: dict[str, str], cookie: str, identities: list[Any]) -> None:
        """Authenticate as somebody of these. In the place of polkit-agent-helper-1, which asks for a password."""
        self.asked.append(action_id)
        self.changed.set()
        if self.meanwhile:
            await asyncio.to_thread(self.meanwhile)
        if self._says_yes is None:
            await self._silent.setdefault(cookie, asyncio.Event()).wait()
        if not self._says_yes:
            raise DBusError(f'{ERROR}Cancelled', 'no')
        kind, facts = identities[0]
        await self._client.call(NAME, PATH, AUTHORITY, 'AuthenticationAgentResponse2', 'us(sa{sv})', os.getuid(),
                                cookie, (kind, facts), types={'uid': 'u'})

    @method('s', names=('cookie',))
    async def CancelAuthentication(self, call: Call, cookie: str) -> None:
        self.cancelled += 1
        self.changed.set()
        self._silent.setdefault(cookie, asyncio.Event()).set()

    async def until(self, asked: int, cancelled: int = 0) -> None:
        """It was asked and cancelled so often."""
        async with asyncio.timeout(PATIENCE):
            while len(self.asked) < asked or self.cancelled < cancelled:
                self.changed.clear()
                await self.changed.wait()
