# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exported objects by path and interface, and the methods that calls mean. Pure.

Objects that a caller may not see behave exactly as if they did not exist.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from ckptd.bus.export import Audience, Exported, Method, Viewer
from ckptd.bus.message import DBusError

ERROR = 'org.freedesktop.DBus.Error.'


class Registry:
    """Objects by path. `common` interfaces exist at every object, and `anywhere` interfaces also at the nodes between
    them.

    nodes: paths that exist even without an object below them, since the existence of such an object may be private.
    """

    def __init__(self, common: Sequence[Exported] = (), anywhere: Sequence[Exported] = (), nodes: Sequence[str] = ()
                 ) -> None:
        self._objects: dict[str, dict[str, Exported]] = {}
        self._standing = frozenset(('/', *nodes, *(above for node in nodes for above in ancestors(node))))
        self._above: Counter[str] = Counter()       # objects below each node
        self._anywhere = {exported.interface: exported for exported in anywhere}
        self._common = self._anywhere | {exported.interface: exported for exported in common}

    def add(self, path: str, exported: Exported) -> None:
        if path not in self._objects:
            self._above.update(ancestors(path))
        interfaces = self._objects.setdefault(path, {})
        if exported.interface in interfaces:
            raise ValueError(f'{exported.interface} is exported at {path} already')
        interfaces[exported.interface] = exported

    def remove(self, path: str) -> list[Exported]:
        """Remove the object at a path. Return its interfaces; empty if there was none."""
        if path not in self._objects:
            return []
        self._above.subtract(ancestors(path))
        self._above = +self._above
        return list(self._objects.pop(path).values())

    def at(self, path: str) -> dict[str, Exported]:
        """Return the object's own interfaces at this path. Empty if there is none."""
        return self._objects.get(path, {})

    def interfaces(self, path: str) -> dict[str, Exported]:
        """Return all interfaces at this path, the standard ones first. UnknownObject if there is no node."""
        if path in self._objects:
            return self._common | self._objects[path]
        if path in self._standing or path in self._above:
            return self._anywhere
        raise unknown_object(path)

    def sees(self, viewer: Viewer, path: str) -> bool:
        """Whether the path exists for this viewer, as an object or as a node above one."""
        if path in self._objects:
            return viewer.may_see(self.audience(path))
        return path in self._standing or (path in self._above and bool(self.children(path, viewer)))

    def below(self, path: str) -> Iterator[str]:
        """Return the paths of the objects below this one."""
        prefix = path.rstrip('/') + '/'
        return (other for other in self._objects if other.startswith(prefix) and other != path)

    def children(self, path: str, viewer: Viewer | None = None) -> list[str]:
        """Return the names of the child nodes, with or without an object of their own: ['ckptd1'] for '/org'. viewer:
        list only nodes that the viewer may see, or below which there is an object that they may see."""
        depth, prefix = len(path.rstrip('/')) + 1, path.rstrip('/') + '/'
        seen = [other for other in self.below(path) if viewer is None or viewer.may_see(self.audience(other))]
        standing = [node for node in self._standing if node.startswith(prefix) and node != path]
        return sorted({other[depth:].partition('/')[0] for other in (*seen, *standing)})

    def audience(self, path: str) -> Audience | None:
        """Return the audience of the object at a path; None for everyone, and if there is no object."""
        return next((exported.audience for exported in self.at(path).values()), None)

    def find(self, path: str, interface: str, member: str, viewer: Viewer) -> tuple[Exported, Method]:
        """Find the method that a call means. A call need not name an interface."""
        if not self.sees(viewer, path):
            raise unknown_object(path)
        found = self.interfaces(path)
        if interface and interface not in found:
            raise DBusError(f'{ERROR}UnknownInterface', f'no interface {interface} at {path}')
        for exported in [found[interface]] if interface else found.values():
            if row := exported.table.methods.get(member):
                return exported, row
        raise DBusError(f'{ERROR}UnknownMethod', f'no method {member} of {interface or "any interface"} at {path}')


def ancestors(path: str) -> Iterator[str]:
    """Yield the nodes above a path, without '/': '/a/b' and '/a' for '/a/b/c'."""
    while (path := path.rpartition('/')[0]):
        yield path


def unknown_object(path: str) -> DBusError:
    return DBusError(f'{ERROR}UnknownObject', f'no object at {path}')
