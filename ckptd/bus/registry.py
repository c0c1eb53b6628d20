# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is exported where: objects by path and interface, and the methods a call can mean. Pure."""

from collections.abc import Iterator, Sequence

from ckptd.bus.export import Audience, Exported, Method, Viewer
from ckptd.bus.message import DBusError

ERROR = 'org.freedesktop.DBus.Error.'


class Registry:
    """Objects by path. `common` interfaces are there at every object, `anywhere` at the nodes between them too."""

    def __init__(self, common: Sequence[Exported] = (), anywhere: Sequence[Exported] = ()) -> None:
        self._objects: dict[str, dict[str, Exported]] = {}
        self._anywhere = {exported.interface: exported for exported in anywhere}
        self._common = self._anywhere | {exported.interface: exported for exported in common}

    def add(self, path: str, exported: Exported) -> None:
        interfaces = self._objects.setdefault(path, {})
        if exported.interface in interfaces:
            raise ValueError(f'{exported.interface} is exported at {path} already')
        interfaces[exported.interface] = exported

    def remove(self, path: str) -> list[Exported]:
        """What was exported there; empty if nothing was."""
        return list(self._objects.pop(path, {}).values())

    def at(self, path: str) -> dict[str, Exported]:
        """Own interfaces of the object at this path; empty where there is none."""
        return self._objects.get(path, {})

    def interfaces(self, path: str) -> dict[str, Exported]:
        """All interfaces at this path, the standard ones first. UnknownObject where there is no node."""
        if path in self._objects:
            return self._common | self._objects[path]
        if path == '/' or self.children(path):
            return self._anywhere
        raise unknown_object(path)

    def below(self, path: str) -> Iterator[str]:
        """Paths of the objects below this one."""
        prefix = path.rstrip('/') + '/'
        return (other for other in self._objects if other.startswith(prefix) and other != path)

    def children(self, path: str, viewer: Viewer | None = None) -> list[str]:
        """Names of the child nodes, with or without an object of their own: of '/org' ['ckptd1']. viewer: those only
        that he may see, or below which he may see something."""
        depth = len(path.rstrip('/')) + 1
        return sorted({other[depth:].partition('/')[0] for other in self.below(path)
                       if viewer is None or viewer.may_see(self.audience(other))})

    def audience(self, path: str) -> Audience | None:
        """Who may see the object at a path; None: everybody, as where there is none."""
        return next((exported.audience for exported in self.at(path).values()), None)

    def find(self, path: str, interface: str, member: str) -> tuple[Exported, Method]:
        """The method that a call means; a call need not name an interface."""
        found = self.interfaces(path)
        if interface and interface not in found:
            raise DBusError(f'{ERROR}UnknownInterface', f'no interface {interface} at {path}')
        for exported in [found[interface]] if interface else found.values():
            if row := exported.table.methods.get(member):
                return exported, row
        raise DBusError(f'{ERROR}UnknownMethod', f'no method {member} of {interface or "any interface"} at {path}')


def unknown_object(path: str) -> DBusError:
    return DBusError(f'{ERROR}UnknownObject', f'no object at {path}')
