# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interfaces as data: the exports of a class are read from it once, into typed tables.

router.py has a full example. Dispatch, introspection and the standard interfaces all use the tables.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, overload

from ckptd.bus.values import split_signature

Emits = Literal['true', 'invalidates', 'const', 'false']
Annotations = Mapping[str, str]
F = TypeVar('F', bound=Callable[..., Any])

EMITS_CHANGED = 'org.freedesktop.DBus.Property.EmitsChangedSignal'
DEPRECATED = 'org.freedesktop.DBus.Deprecated'
NO_REPLY = 'org.freedesktop.DBus.Method.NoReply'
DOC = 'org.gtk.GDBus.DocString'     # read by gdbus-codegen(1) and documentation tools


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a method or signal: a complete type, and a name for introspection."""
    signature: str
    name: str


@dataclass(frozen=True, slots=True)
class Method:
    """An exported method."""
    name: str
    handler: Callable[..., Awaitable[Any]]
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    types: Mapping[str, str]    # D-Bus types of the keys of a{sv} results, {'pid': 'u'}; an int without an entry
                                # becomes 't'
    annotations: Annotations
    long: bool = False          # the answer grows with the number of objects; one such call of a user is served at a
                                # time

    @property
    def in_signature(self) -> str:
        return ''.join(argument.signature for argument in self.inputs)

    @property
    def out_signature(self) -> str:
        return ''.join(argument.signature for argument in self.outputs)


@dataclass(frozen=True, slots=True)
class Property:
    """A read-only property."""
    name: str
    getter: Callable[..., Any]
    signature: str
    emits: Emits    # the EmitsChangedSignal annotation; 'const' never changes while the object lives
    types: Mapping[str, str]
    annotations: Annotations
    personal: bool = False    # the value depends on the viewer, who is passed to the getter


@dataclass(frozen=True, slots=True)
class Audience:
    """Viewers who may see an object or hear a signal: root, the user `uid`, and the connections `senders`."""
    uid: int
    senders: frozenset[str] = frozenset()
    followers: 'set[str] | None' = None    # if set, only these of the viewers hear signals of the object; the set may
                                           # grow


@dataclass(frozen=True, slots=True)
class Viewer:
    """A viewer of objects. all: the viewer also sees other users' objects."""
    uid: int
    all: bool = False

    def may_see(self, audience: 'Audience | None') -> bool:
        return audience is None or self.sees(audience.uid)

    def sees(self, owner: int) -> bool:
        """Whether this viewer sees objects that belong to the uid."""
        return self.all or self.uid in (0, owner)


class Emitter(Protocol):
    """A receiver of the signals of exported objects: the router."""

    def emit(self, path: str, interface: str, name: str, signature: str, values: Sequence[Any],
             types: Mapping[str, str], audience: Audience | None) -> None: ...

    def properties_changed(self, path: str, exported: 'Exported', names: Sequence[str],
                           audience: Audience | None) -> None: ...


class BoundSignal:
    """A signal bound to an object. `self.JobNew(7, path)` sends it to all who may see the object;
    `self.JobNew.to(audience, 7, path)` sends it to others. Before export and after unexport it does nothing."""
    __slots__ = ('_owner', '_signal')

    def __init__(self, signal_: 'SignalMember', owner: 'Exported') -> None:
        self._signal, self._owner = signal_, owner

    def __call__(self, *values: Any) -> None:
        self.to(self._owner.audience, *values)

    def to(self, audience: Audience | None, *values: Any) -> None:
        row, owner = self._signal, self._owner
        if owner.emitter is not None:
            owner.emitter.emit(owner.path, owner.interface, row.name, row.signature, values, row.types, audience)


@dataclass(slots=True, eq=False)
class SignalMember:
    """A signal, declared as an attribute of a class."""
    arguments: tuple[Argument, ...]
    types: Mapping[str, str]
    annotations: Annotations
    name: str = ''
    signature: str = field(init=False)

    def __post_init__(self) -> None:
        self.signature = ''.join(argument.signature for argument in self.arguments)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = self.name or _dbus_name(name)

    @overload
    def __get__(self, instance: None, owner: type) -> 'SignalMember': ...
    @overload
    def __get__(self, instance: 'Exported', owner: type) -> BoundSignal: ...

    def __get__(self, instance: 'Exported | None', owner: type) -> 'SignalMember | BoundSignal':
        return self if instance is None else BoundSignal(self, instance)


@dataclass(frozen=True, slots=True)
class Interface:
    """The tables of one exported class."""
    name: str
    methods: dict[str, Method]
    properties: dict[str, Property]
    signals: dict[str, SignalMember]


class Exported:
    """Base of all exported objects: one interface at one path. Subclasses set `interface`.

    audience: viewers who may see the object; None for everyone. For all others the object does not exist. If the
    audience has a set of followers, the object's signals go to those only: connections that were given its path or have
    called it.
    """
    interface: ClassVar[str]
    table: ClassVar[Interface]
    audience: Audience | None = None
    path: str = ''
    emitter: Emitter | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if 'interface' not in cls.__dict__:
            return
        members = [value for base in reversed(cls.__mro__) for value in base.__dict__.values()]
        rows = [getattr(value, '_dbus_row', value) for value in members]
        cls.table = Interface(
            cls.interface,
            {row.name: row for row in rows if isinstance(row, Method)},
            {row.name: row for row in rows if isinstance(row, Property)},
            {row.name: row for row in rows if isinstance(row, SignalMember)})

    def changed(self, *names: str, to: Audience | None = None) -> None:
        """Announce new values of these properties by PropertiesChanged, at most a few times a second; the last change
        is always sent. to: viewers for whom the values changed, if not all who see the object."""
        if self.emitter is not None:
            self.emitter.properties_changed(self.path, self, names, to or self.audience)


def method(inputs: str = '', outputs: str = '', names: Sequence[str] = (), *, name: str = '',
           types: Mapping[str, str] | None = None, annotations: Annotations | None = None, long: bool = False
           ) -> Callable[[F], F]:
    """Export `async def Name(self, call, *arguments)`. names: of the inputs, then of the outputs.

    The handler returns the value of its one output, a tuple for several, None for none.
    """
    def decorate(handler: F) -> F:
        taken, given = _arguments(inputs, names), split_signature(outputs)
        rest = names[len(taken):] or [f'result{index}' if index else 'result' for index in range(len(given))]
        _expect_parameters(handler, len(taken))
        row = Method(name or _dbus_name(handler.__name__), handler, taken,
                     _pair(given, rest), types or {}, _documented(annotations, handler.__doc__), long)
        handler._dbus_row = row    # type: ignore[attr-defined]
        return handler
    return decorate


def property_(signature: str, *, emits: Emits = 'true', name: str = '', types: Mapping[str, str] | None = None,
              annotations: Annotations | None = None) -> Callable[[F], F]:
    """Export `def Name(self) -> value` or, for a value that differs between viewers, `def Name(self, viewer) -> value`.
    Such a value cannot be sent to all ('invalidates'). If the getter raises, GetAll leaves the property out and Get
    answers with an error."""
    def decorate(getter: F) -> F:
        personal = len(inspect.signature(getter).parameters) > 1
        if personal and emits == 'true':
            raise TypeError(f'{getter.__qualname__} differs from viewer to viewer: its value cannot be sent to all')
        shown = dict(_documented(annotations, getter.__doc__))
        if emits != 'true':
            shown[EMITS_CHANGED] = emits
        row = Property(name or _dbus_name(getter.__name__), getter, signature, emits, types or {}, shown,
                       personal)
        getter._dbus_row = row     # type: ignore[attr-defined]
        return getter
    return decorate


def signal(signature: str = '', names: Sequence[str] = (), *, name: str = '', types: Mapping[str, str] | None = None,
           annotations: Annotations | None = None, doc: str = '') -> SignalMember:
    """Declare a signal: `JobNew = signal('uo', names=('id', 'job'))`. `self.JobNew(7, path)` sends it. doc: its
    meaning."""
    return SignalMember(_arguments(signature, names), types or {}, _documented(annotations, doc), name)


def _documented(annotations: Annotations | None, doc: str | None) -> Annotations:
    """Add the docstring, as one paragraph, to the annotations, so that introspection shows it."""
    return {**({DOC: ' '.join(doc.split())} if doc else {}), **(annotations or {})}


def _arguments(signature: str, names: Sequence[str]) -> tuple[Argument, ...]:
    kinds = split_signature(signature)
    shown = names[:len(kinds)] or [f'arg{index}' for index in range(len(kinds))]
    return _pair(kinds, shown)


def _pair(kinds: Sequence[str], names: Sequence[str]) -> tuple[Argument, ...]:
    return tuple(Argument(kind, name) for kind, name in zip(kinds, names, strict=True))


def _dbus_name(name: str) -> str:
    """Return the D-Bus name: 'CheckpointProcess' for itself and for 'checkpoint_process'."""
    return name if name[0].isupper() else ''.join(part.capitalize() for part in name.split('_'))


def _expect_parameters(handler: Callable[..., Any], count: int) -> None:
    found = len(inspect.signature(handler).parameters) - 2
    if found != count or not inspect.iscoroutinefunction(handler):
        raise TypeError(f'{handler.__qualname__} must be async and take self, call and {count} arguments, not {found}')
