# SPDX-License-Identifier: LGPL-2.1-or-later
"""All attributes: every subclass of Attribute with a name, in a module of this package.

A new attribute is a new file, or a few lines in prctl.py. Nothing else changes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.grammar import Record, Struct
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.image.records import TaskAttribute
from ckptd.kernel import maps
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.status import Status
from ckptd.objects import attributes
from ckptd.objects.attributes.base import (
    Attribute,
    DumpedTask,
    Owners,
    RestartRights,
    RestoredTask,
    Scope,
    Stage,
    about,
)
from ckptd.objects.modules import modules_of
from ckptd.remote.batch import Batch, Results
from ckptd.remote.interleave import Steps
from ckptd.tree import Task

RunBatch: TypeAlias = Callable[[Batch], Steps[Results]]


def _named(cls: type[Attribute[Any, Any]]) -> Iterator[Attribute[Any, Any]]:
    for one in cls.__subclasses__():
        if 'name' in vars(one):
            yield one()
        yield from _named(one)


def _discover() -> tuple[Attribute[Any, Any], ...]:
    modules_of(attributes)
    found = list(_named(Attribute))  # type: ignore[type-abstract]
    names = [one.name for one in found]
    if len(set(names)) != len(names):
        raise TypeError(f'two attributes have one name: {sorted(names)}')
    return tuple(sorted(found, key=lambda one: (one.stage, one.scope, one.name)))


ATTRIBUTES = _discover()
BY_NAME = {one.name: one for one in ATTRIBUTES}
_BY_STAGE = {stage: [one for one in ATTRIBUTES if one.stage is stage and type(one).restore is not Attribute.restore]
             for stage in Stage}
_FINISHING = [one for one in ATTRIBUTES if type(one).finish is not Attribute.finish]
_LOOKING = [one for one in ATTRIBUTES if type(one).look is not Attribute.look]
_REQUIRING = [one for one in ATTRIBUTES if type(one).require is not Attribute.require]
_WITH_MORE = [one for one in ATTRIBUTES if type(one).ask_more is not Attribute.ask_more]
_OF_DEAD = [one for one in ATTRIBUTES if type(one).dump_dead is not Attribute.dump_dead]
_LENDING = [one for one in ATTRIBUTES if type(one).lend is not Attribute.lend]
_FOUND_OUTSIDE = [one for one in ATTRIBUTES if type(one).findings is not Attribute.findings]


# ---------------------------------------------------------------- dump

def findings(task: Task, status: Status) -> list[Finding]:
    """List the reasons why a task cannot be dumped, as seen from outside."""
    return [row for one in _FOUND_OUTSIDE for row in one.findings(task, status)]


def lend(status: Status, tracee: Tracee) -> None:
    """Prepare a stopped task for calls that it makes for us."""
    for one in _LENDING:
        one.lend(status, tracee)


class Questions:
    """The calls of the attributes of some scopes, added to a batch. They are the same for every task."""

    def __init__(self, batch: Batch, scopes: Iterable[Scope]) -> None:
        self._readers = {one.name: reader for one in ATTRIBUTES if one.scope in scopes
                         if (reader := one.ask(batch)) is not None}

    def answer(self, name: str, results: Results) -> Any:
        """Decode an answer; None for an attribute that has not asked."""
        reader = self._readers.get(name)
        return reader and reader(results)


class Answers:
    """The answers of a stopped task. Those in the results of a batch are decoded when they are used, since most are
    used when the tree runs again. found: others, by name of the attribute."""
    __slots__ = ('_found', '_questions', '_results')

    def __init__(self, questions: Questions, results: Results, found: Mapping[str, Any]) -> None:
        self._questions, self._results, self._found = questions, results, dict(found)

    def __getitem__(self, name: str) -> Any:
        if name in self._found:
            return self._found[name]
        return self._questions.answer(name, self._results)

    def look(self, owners: Owners, task: Task, tracee: Tracee) -> None:
        """Add what only we can read, and check that all of it can be saved. NotSupported."""
        for one in _LOOKING:
            if one.scope in owners:
                self._found[one.name] = one.look(tracee)
        for one in _REQUIRING:
            if one.scope in owners:
                one.require(task, self[one.name])


def ask_more(tid: int, mappings: Sequence[maps.Mapping], run: RunBatch) -> Steps[dict[str, Any]]:
    """Return the answers of attributes that need batches of their own. run: lets the process execute one."""
    found = {}
    for one in _WITH_MORE:
        questions = one.ask_more(tid, mappings)
        if questions is None:
            continue
        try:
            batch = next(questions)
            while True:
                batch = questions.send((yield from run(batch)))
        except StopIteration as end:
            found[one.name] = end.value
    return found


def dump(owners: Owners, of: DumpedTask, answers: Answers) -> Iterator[Record]:
    """Yield the records of all attributes that a task answers for."""
    shared: dict[type[Record], tuple[int, dict[str, Any]]] = {}
    for one in ATTRIBUTES:
        if not (owner := owners.get(one.scope)):
            continue
        found = one.dump(of, answers[one.name])
        match found:
            case None:
                continue
            case Record():
                yield found
            case Struct():
                yield TaskAttribute(owner, one.scope, one.name, found.encode())
            case _:
                shared.setdefault(one.record, (owner, {}))[1].update(found)  # type: ignore[arg-type]
    for cls, (owner, fields) in shared.items():
        yield cls(owner, **fields)  # type: ignore[call-arg]


def dump_dead(task: Task, status: Status) -> Iterator[Record]:
    """Yield the records of a zombie."""
    for one in _OF_DEAD:
        if isinstance(found := one.dump_dead(task, status), Record):
            yield found


# ---------------------------------------------------------------- restart

class Kept:
    """The attributes in an image."""

    def __init__(self, reader: ImageReader) -> None:
        self.reader = reader

    @cached_property
    def _own(self) -> Mapping[tuple[int, int], dict[str, bytes]]:
        """Layouts of attributes by scope and owner, and for each by name."""
        found: dict[tuple[int, int], dict[str, bytes]] = defaultdict(dict)
        for one in self.reader.every(TaskAttribute):
            found[one.scope, one.owner][one.name] = one.data
        return found

    def record(self, attribute: Attribute[Any, Any], owner: int) -> Any:
        """Return the data of an attribute in the image; None for the value of a new task. ImageDamaged."""
        if issubclass(attribute.record, Record):
            return self.reader.get(attribute.record, owner)
        data = self._own.get((attribute.scope, owner), {}).get(attribute.name)
        if data is None:
            return None
        try:
            return attribute.record.decode(data)
        except ImageDamaged as error:
            raise ImageDamaged(f'TaskAttribute {attribute.name} of {owner}: {error.message}',
                               resource=attribute.name) from error

    def obstacles(self, owners: Owners, task: ImageTask, rights: RestartRights) -> Iterator[Finding]:
        """Yield the reasons why attributes of a task cannot be set again."""
        for one in ATTRIBUTES:
            if (owner := owners.get(one.scope)) and (record := self.record(one, owner)) is not None:
                yield from one.obstacles(record, task, rights)

    def unknown(self) -> Iterator[Finding]:
        """Yield attributes in the image that this ckptd does not know: they would be lost."""
        for name in sorted({one.name for one in self.reader.every(TaskAttribute)} - BY_NAME.keys()):
            yield about(0, name, 'EOPNOTSUPP', f'the image has the attribute "{name}" of tasks, which this ckptd does '
                        'not know', 'restore it with the ckptd that made it, or a newer one')

    def restore(self, stage: Stage, owners: Owners, to: RestoredTask) -> Steps[None]:
        """Collect the calls of a task at a stage in its script, and make our own calls from outside."""
        for one in _BY_STAGE[stage]:
            if (owner := owners.get(one.scope)) and (record := self.record(one, owner)) is not None \
                    and (work := one.restore(record, to)) is not None:
                yield from work

    def finish(self, vpid: int, tracee: Tracee) -> None:
        """Set the state that the tracer sets for a thread that is no longer a stub."""
        for one in _FINISHING:
            if (record := self.record(one, vpid)) is not None:
                one.finish(record, tracee)
