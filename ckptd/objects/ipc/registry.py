# SPDX-License-Identifier: LGPL-2.1-or-later
"""All types of System V objects: every subclass of SystemVKind in a module of this package."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckptd.errors import Busy, CkptError, Finding, ImageDamaged, errno_name
from ckptd.image.reader import ImageReader
from ckptd.image.records import SystemVObject
from ckptd.journal.steps import MakeSystemV
from ckptd.objects import ipc
from ckptd.objects.attributes.base import about
from ckptd.objects.ipc.base import MAX_MODE, IpcCheck, SystemVKind
from ckptd.objects.modules import modules_of
from ckptd.sysv import SysvName

_GONE = (errno.EINVAL, errno.EIDRM)
_IDS = (1 << 32) - 1        # -1 is no owner


def _discover() -> dict[str, SystemVKind[Any]]:
    modules_of(ipc)
    return {cls.tag: cls() for cls in SystemVKind.__subclasses__()}


BY_TYPE = _discover()


@dataclass(frozen=True, slots=True)
class _Object:
    """An object of an image, or of this machine."""
    kind: SystemVKind[Any]
    id: int

    @property
    def resource(self) -> str:
        return f'{self.kind.tag}:{self.id}'

    def __str__(self) -> str:
        return f'{self.kind.words} {self.id}'

    def row(self, errno: str, reason: str, hint: str) -> Finding:
        return about(0, self.resource, errno, reason, hint)


# ---------------------------------------------------------------- dump

def findings(names: Sequence[SysvName], tid: int) -> Iterator[Finding]:
    """Refuse objects that cannot get into the image. tid: of the root of the tree."""
    if names and not os.path.samefile(f'/proc/{tid}/ns/ipc', '/proc/self/ns/ipc'):  # noqa: PTH121
        yield about(0, 'sysv', 'EOPNOTSUPP', 'the tree is in another IPC namespace than ckptd, where the same ids are '
                    'other objects', 'leave out --sysv')
        return
    for name in dict.fromkeys(names):
        found = _found(name)
        if not found:
            yield about(0, f'sysv {name}', 'ENOENT', f'no set of System V semaphores and no message queue is {name}',
                        '"ipcs -s -q" shows them; a segment of shared memory that is mapped needs no --sysv')
        elif len(found) > 1:
            yield about(0, f'sysv {name}', 'EINVAL', f'both a set of semaphores and a message queue have the id {name}',
                        f'say which: {", ".join(one.resource for one in found)}')
        else:
            yield from _unreadable(found[0])


def _found(name: SysvName) -> list[_Object]:
    return [_Object(kind, name.id) for kind in BY_TYPE.values()
            if name.type in ('', kind.tag) and name.id in kind.living()]


def _unreadable(one: _Object) -> Iterator[Finding]:
    try:
        one.kind.read(one.id)
    except OSError as error:
        yield one.row(errno_name(error.errno or errno.EIO), f'the {one} cannot be read: {error.strerror}',
                      'checkpoint as its owner, or as root')


def are_in_image(names: Sequence[SysvName], type_: str, number: int) -> bool:
    """Whether an object belongs to the image."""
    return any(name.type in ('', type_) and name.id == number for name in names)


def dump(names: Sequence[SysvName]) -> list[SystemVObject]:
    """Return the records of the objects with these names. CkptError."""
    chosen = dict.fromkeys(one for name in names for one in _found(name))
    records = []
    for number, one in enumerate(chosen, 1):
        try:
            state = one.kind.read(one.id)
        except OSError as error:
            raise CkptError(f'the {one} cannot be read: {error.strerror}', errno=error.errno, resource=one.resource
                            ) from error
        records.append(SystemVObject(number, one.kind.tag, one.id, state.encode()))
    return records


# ---------------------------------------------------------------- restart

def decode(record: SystemVObject) -> tuple[_Object, Any]:
    """Return an object of an image with its state. ImageDamaged."""
    kind = BY_TYPE.get(record.type)
    if kind is None:
        raise ImageDamaged(f'a System V object of the unknown type {record.type!r}', resource='sysv',
                           hint='use the ckptd that wrote the image, or a newer one')
    state: Any = kind.state.decode(record.data)
    one = _Object(kind, record.id)
    of = state.permissions
    found = list(kind.flaws(state))
    if of.mode > MAX_MODE or _IDS in (of.uid, of.gid) or record.id >= 1 << 31:
        found.append(f'mode {of.mode:#o}, owner {of.uid}:{of.gid}')
    if found:
        raise ImageDamaged(f'the {one}: {found[0]}', resource=one.resource)
    return one, state


def damages(reader: ImageReader) -> Iterator[str]:
    """Yield the damages of the System V objects of an image, one sentence each."""
    for record in reader.every(SystemVObject):
        try:
            decode(record)
        except ImageDamaged as error:
            yield error.message


def restart_findings(context: IpcCheck) -> Iterator[Finding]:
    """Check System V objects. One that lives and is as it was is used as it is; otherwise its id must be free."""
    for record in context.reader.every(SystemVObject):
        try:
            one, state = decode(record)
        except ImageDamaged as error:
            yield about(0, error.resource, errno_name(error.errno), error.message, error.hint)
            continue
        try:
            if not _lives(one, state):
                yield from _not_makeable(one, state, context)
        except CkptError as error:
            yield one.row(errno_name(error.errno), error.message, error.hint)


def _lives(one: _Object, state: Any) -> bool:
    """Whether the object is there, and as it was. Busy if it is not as it was."""
    try:
        if one.kind.read(one.id) == state:
            return True
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise Busy(f'its id has the {one} of another user: {error.strerror}', errno=error.errno, resource=one.resource,
                   hint=f'have its owner remove it (ipcrm {one.kind.remove} {one.id})') from error
    raise Busy(f'the {one} exists and is not as it was at the checkpoint', resource=one.resource,
               hint=f'if nobody needs it: ipcrm {one.kind.remove} {one.id}')


def _not_makeable(one: _Object, state: Any, context: IpcCheck) -> Iterator[Finding]:
    of, lookup = state.permissions, context.lookup
    if other := next((number for number, key in one.kind.living().items() if key == of.key != 0), None):
        yield one.row('EEXIST', f'the key {of.key:#x} of the {one} is that of {other} now',
                      f'ipcrm {one.kind.remove} {other} removes it')
    if not (lookup.by_root or lookup.may_own(of.uid, of.gid)):
        yield one.row('EPERM', f'the {one} belonged to uid {of.uid} and gid {of.gid}, and is gone: uid {lookup.uid} '
                      'may not make one of theirs', 'restore it as root')
    if not os.access(f'/proc/sys/kernel/{one.kind.tag}_next_id', os.W_OK, effective_ids=True):
        yield one.row('EPERM', f'the {one} cannot be made with its old id', 'restore it as root')
    for obstacle in one.kind.obstacles(state, context):
        yield one.row(obstacle.errno, f'the {one} cannot be made again: {obstacle.reason}', obstacle.hint)


def make_all(reader: ImageReader, note: Callable[[MakeSystemV], None]) -> None:
    """Make the objects of an image that are gone. note: writes down each of them. CkptError."""
    for record in reader.every(SystemVObject):
        one, state = decode(record)
        if _lives(one, state):
            continue
        try:
            one.kind.make(one.id, state)
            note(MakeSystemV(one.id, state.permissions.key, one.kind.tag == 'msg', os.geteuid(), os.getegid(),
                             tuple(os.getgroups())))
            one.kind.fill(one.id, state)
        except OSError as error:
            raise CkptError(f'cannot make the {one}: {error.strerror}', errno=error.errno, resource=one.resource
                            ) from error
