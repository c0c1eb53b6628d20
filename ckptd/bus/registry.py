# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is exported where: objects by path and interface, and the methods a call can mean. Pure.

What somebody may not see is not there for him: every answer is that which he had if nobody else had anything.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from ckptd.bus.export import Audience, Exported, Method, Viewer
from ckptd.bus.message import DBusError

ERROR = 'org.freedesktop.DBus.Error.'


class Registry:
    """Objects by path. `common` interfaces are there at every object, `anywhere` at the nodes between them too. nodes:
    that are there though nothing be below them: whether something is may be nobody's business."""

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
        """What was exported there; empty if nothing was."""
        if path not in self._objects:
            return []
        self._above.subtract(ancestors(path))
        self._above = +self._above
        return list(self._objects.pop(path).values())

    def at(self, path: str) -> dict[str, Exported]:
        """Own interfaces of the object at this path; empty where there is none."""
        return self._objects.get(path, {})

    def interfaces(self, path: str) -> dict[str, Exported]:
        """All interfaces at this path, the standard ones first. UnknownObject where there is no node."""
        if path in self._objects:
            return self._common | self._objects[path]
        if path in self._standing or path in self._above:
            return self._anywhere
        raise unknown_object(path)

    def sees(self, viewer: Viewer, path: str) -> bool:
        """Whether there is something at the path for this viewer: an object, or a node above one."""
        if path in self._objects:
            return viewer.may_see(self.audience(path))
        return path in self._standing or (path in self._above and bool(self.children(path, viewer)))

    def below(self, path: str) -> Iterator[str]:
        """Paths of the objects below this one."""
        prefix = path.rstrip('/') + '/'
        return (other for other in self._objects if other.startswith(prefix) and other != path)

    def children(self, path: str, viewer: Viewer | None = None) -> list[str]:
        """Names of the child nodes, with or without an object of their own: of '/org' ['ckptd1']. viewer: those only
        that he may see, or below which he may see something."""
        depth, prefix = len(path.rstrip('/')) + 1, path.rstrip('/') + '/'
        seen = [other for other in self.below(path) if viewer is None or viewer.may_see(self.audience(other))]
        standing = [node for node in self._standing if node.startswith(prefix) and node != path]
        return sorted({other[depth:].partition('/')[0] for other in (*seen, *standing)})

    def audience(self, path: str) -> Audience | None:
        """Who may see the object at a path; None: everybody, as where there is none."""
        return next((exported.audience for exported in self.at(path).values()), None)

    def find(self, path: str, interface: str, member: str, viewer: Viewer) -> tuple[Exported, Method]:
        """The method that a call means; a call need not name an interface."""
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
    """The nodes above a path, without '/': of '/a/b/c' '/a/b' and '/a'."""
    while (path := path.rpartition('/')[0]):
        yield path


def unknown_object(path: str) -> DBusError:
    return DBusError(f'{ERROR}UnknownObject', f'no object at {path}')
