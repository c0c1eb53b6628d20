# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exported objects for tests: every way in which a handler can end."""

import asyncio
import os
from typing import Any

from ckptd.bus.call import Call
from ckptd.bus.export import DEPRECATED, Exported, method, property_, signal
from ckptd.errors import Finding, PermissionDenied

NAME = 'org.ckptd1.Sample'
ROOT = '/org/ckptd1/sample'
INTERFACE = 'org.ckptd1.Sample'
ITEM = 'org.ckptd1.Item'


class Sample(Exported):
    interface = INTERFACE

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.started = asyncio.Event()
        self.running = self.most = self.calls = 0
        self.taken: list[int] = []

    @method('a{sv}', 'a{sv}', names=('options', 'result'), types={'pid': 'u'})
    async def Echo(self, call: Call, options: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return options

    @method('h', 't', names=('file', 'inode'))
    async def Inode(self, call: Call, file: int) -> int:
        """What is behind an fd, which is then left to the router."""
        return os.fstat(file).st_ino

    @method('h')
    async def Keep(self, call: Call, file: int) -> None:
        self.taken.append(call.take(file))

    @method()
    async def Wait(self, call: Call) -> None:
        await self._wait()

    @method(long=True)
    async def WaitLong(self, call: Call) -> None:
        await self._wait()

    @method('u', 'a{sv}', names=('count', 'result'))
    async def Rows(self, call: Call, count: int) -> dict[str, Any]:
        return {'rows': [{'number': number} for number in range(count)]}

    async def _wait(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.started.set()
        try:
            await self.release.wait()
        finally:
            self.running -= 1

    @method()
    async def Crash(self, call: Call) -> None:
        raise RuntimeError('/secret/path of the daemon')

    @method()
    async def Refuse(self, call: Call) -> None:
        raise PermissionDenied('not yours', task=42, resource='ptrace',
                               refusals=[Finding(42, 'sleep', 'ptrace', 'EPERM', 'no access', 'be root')])

    @method('uu', 'as', names=('count', 'size'))
    async def Large(self, call: Call, count: int, size: int) -> list[str]:
        return ['x' * size] * count

    @method('uu')
    async def Grumble(self, call: Call, count: int, size: int) -> None:
        raise PermissionDenied('not yours', refusals=[Finding(42, 'sleep', 'x' * size, 'EPERM', 'no', 'no')] * count)

    @method('', 'u')
    async def Wrong(self, call: Call) -> int:
        return -1

    @method('', 'uts', names=('uid', 'pid', 'capabilities'))
    async def WhoAmI(self, call: Call) -> tuple[int, int, str]:
        caller = await call.credentials()
        return caller.uid, caller.pid, hex(caller.capabilities)

    @method('', 'b', annotations={DEPRECATED: 'true'})
    async def old_style_name(self, call: Call) -> bool:
        return True

    @property_('s', emits='const')
    def Version(self) -> str:
        return '1'

    @property_('u')
    def Calls(self) -> int:
        return self.calls

    @property_('s')
    def Broken(self) -> str:
        raise RuntimeError('cannot be read')

    @property_('a{sv}', emits='invalidates', types={'pid': 'u'})
    def Row(self) -> dict[str, Any]:
        return {'pid': 1}

    Happened = signal('us', names=('number', 'text'))


class Item(Exported):
    interface = ITEM

    @property_('s')
    def Name(self) -> str:
        return self.path.rpartition('/')[2]
