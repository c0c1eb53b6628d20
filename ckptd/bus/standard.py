# SPDX-License-Identifier: LGPL-2.1-or-later
"""The standard interfaces, declared like ckptd's own (D-Bus specification, "Standard Interfaces")."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptd.bus.connection import PROPERTIES
from ckptd.bus.export import Audience, Exported, Property, Viewer, method, signal
from ckptd.bus.introspect import introspection_xml
from ckptd.bus.message import DBusError
from ckptd.bus.registry import ERROR, Registry
from ckptd.bus.values import to_variant
from ckptd.bus.wire import Variant

if TYPE_CHECKING:
    from ckptd.bus.call import Call

log = logging.getLogger(__name__)

CHANGE_INTERVAL: Final = 0.15       # seconds between two PropertiesChanged of one interface: some 7 a second
TOGETHER: Final = 50                # objects that are described without a pause: each takes some 60 us
NOBODY: Final = Viewer(-1)          # viewer for signals that go to several receivers with the same content
MACHINE_ID: Final = (Path('/etc/machine-id'), Path('/var/lib/dbus/machine-id'))


class PeerInterface(Exported):
    interface = 'org.freedesktop.DBus.Peer'

    @method()
    async def Ping(self, call: 'Call') -> None:
        pass

    @method('', 's', names=('machine_uuid',))
    async def GetMachineId(self, call: 'Call') -> str:
        for path in MACHINE_ID:
            if path.exists():
                return path.read_text().strip()
        raise DBusError(f'{ERROR}FileNotFound', 'this machine has no machine id')


class Introspectable(Exported):
    interface = 'org.freedesktop.DBus.Introspectable'
    registry: Registry

    @method('', 's', names=('xml_data',), long=True)
    async def Introspect(self, call: 'Call') -> str:
        path = call.message.path
        tables = [exported.table for exported in self.registry.interfaces(path).values()]
        return introspection_xml(tables, self.registry.children(path, await call.viewer()))


class Properties(Exported):
    interface = PROPERTIES
    registry: Registry

    PropertiesChanged = signal('sa{sv}as', names=('interface_name', 'changed_properties', 'invalidated_properties'))

    @method('ss', 'v', names=('interface_name', 'property_name', 'value'))
    async def Get(self, call: 'Call', interface: str, name: str) -> Variant:
        for exported in self._chosen(call, interface):
            if row := exported.table.properties.get(name):
                return read_property(exported, row, await call.viewer() if row.personal else NOBODY)
        raise DBusError(f'{ERROR}UnknownProperty', f'no property {name} of {interface or "any interface"}')

    @method('s', 'a{sv}', names=('interface_name', 'properties'))
    async def GetAll(self, call: 'Call', interface: str) -> dict[str, Variant]:
        chosen = self._chosen(call, interface)
        personal = any(row.personal for exported in chosen for row in exported.table.properties.values())
        viewer = await call.viewer() if personal else NOBODY
        return {name: value for exported in chosen
                for name, value in read_properties(exported, viewer).items()}

    @method('ssv', names=('interface_name', 'property_name', 'value'))
    async def Set(self, call: 'Call', interface: str, name: str, value: object) -> None:
        await self.Get(call, interface, name)
        raise DBusError(f'{ERROR}PropertyReadOnly', f'{name} is read-only')

    def _chosen(self, call: 'Call', interface: str) -> list[Exported]:
        """Return the interface that is meant. An empty name means all."""
        found = self.registry.interfaces(call.message.path)
        if interface and interface not in found:
            raise DBusError(f'{ERROR}UnknownInterface', f'no interface {interface} at {call.message.path}')
        return [found[interface]] if interface else list(found.values())


class ObjectManager(Exported):
    """The object manager, on one root path. Its signals come from there, wherever below it the object is."""
    interface = 'org.freedesktop.DBus.ObjectManager'

    def __init__(self, registry: Registry, root: str) -> None:
        self._registry, self._root = registry, root

    InterfacesAdded = signal('oa{sa{sv}}', names=('object_path', 'interfaces_and_properties'))
    InterfacesRemoved = signal('oas', names=('object_path', 'interfaces'))

    @method('', 'a{oa{sa{sv}}}', names=('objects',), long=True)
    async def GetManagedObjects(self, call: 'Call') -> dict[str, dict[str, dict[str, Variant]]]:
        viewer = await call.viewer()
        found = {}
        for number, path in enumerate(list(self._registry.below(self._root)), 1):
            if self._registry.at(path) and viewer.may_see(self._registry.audience(path)):
                found[path] = _cache(list(self._registry.at(path).values()))
            if number % TOGETHER == 0:
                await asyncio.sleep(0)      # let other calls run
        return found

    def added(self, path: str, exported: Sequence[Exported]) -> None:
        if path != self._root:
            self.InterfacesAdded.to(_all_of(exported[0].audience), path, _cache(exported))

    def removed(self, path: str, exported: Sequence[Exported]) -> None:
        if path != self._root and exported:
            self.InterfacesRemoved.to(_all_of(exported[0].audience), path, [one.interface for one in exported])


def _all_of(audience: Audience | None) -> Audience | None:
    """Return the audience for the appearance and removal of an object: not its followers only."""
    return None if audience is None else replace(audience, followers=None)


class _ChangeSource(NamedTuple):
    """A source of property changes and its receivers. Receivers of one object differ by `uid` and `all`."""
    exported: Exported
    uid: int     # of the audience; -1 for everyone
    all: bool    # not for followers only


class Changes:
    """PropertiesChanged, throttled: the first is sent at once, later ones are gathered, the last is always sent."""

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit = emit
        self._waiting: dict[_ChangeSource, dict[str, None]] = {}     # names in the order in which they changed
        self._audiences: dict[_ChangeSource, Audience | None] = {}
        self._timers: dict[_ChangeSource, asyncio.TimerHandle] = {}

    def add(self, path: str, exported: Exported, names: Sequence[str], audience: Audience | None) -> None:
        """Note new values of these properties."""
        source = _ChangeSource(exported, -1 if audience is None else audience.uid,
                         audience is None or audience.followers is None)
        self._waiting.setdefault(source, {}).update(dict.fromkeys(names))
        if source not in self._timers:
            self._audiences[source] = audience
            # send it in the next turn of the loop, so that simultaneous changes go out together
            self._timers[source] = asyncio.get_running_loop().call_later(0, self._due, source)

    def flush(self, path: str) -> None:
        """Send the pending changes of this object now, because it is being removed."""
        for source in [one for one in self._timers if one.exported.path == path]:
            self._timers.pop(source).cancel()
            self._send(source)
            del self._audiences[source]

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _due(self, source: _ChangeSource) -> None:
        del self._timers[source]
        if self._send(source):
            self._timers[source] = asyncio.get_running_loop().call_later(CHANGE_INTERVAL, self._due, source)
        else:
            del self._audiences[source]

    def _send(self, source: _ChangeSource) -> bool:
        exported, names = source.exported, self._waiting.pop(source, {})
        rows = [exported.table.properties[name] for name in names]
        values = _readable(exported, [row for row in rows if row.emits == 'true'], NOBODY)
        gone = [row.name for row in rows if row.emits != 'const' and row.name not in values]
        if values or gone:
            self._emit(exported.path, PROPERTIES, 'PropertiesChanged', 'sa{sv}as', (exported.interface, values, gone),
                       audience=self._audiences[source])
        return bool(names)


def read_property(exported: Exported, row: Property, viewer: Viewer) -> Variant:
    value = row.getter(exported, viewer) if row.personal else row.getter(exported)
    return to_variant(value, row.signature, row.types)


def read_properties(exported: Exported, viewer: Viewer) -> dict[str, Variant]:
    """Read all properties. A getter that fails loses its own property only."""
    return _readable(exported, exported.table.properties.values(), viewer)


def _readable(exported: Exported, rows: Any, viewer: Viewer) -> dict[str, Variant]:
    values = {}
    for row in rows:
        try:
            values[row.name] = read_property(exported, row, viewer)
        except Exception:
            # any error at all: the other properties are still good
            log.exception('property %s.%s at %s', exported.interface, row.name, exported.path)
    return values


def _cache(exported: Sequence[Exported]) -> dict[str, dict[str, Variant]]:
    return {one.interface: read_properties(one, NOBODY) for one in exported}
