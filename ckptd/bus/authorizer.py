# SPDX-License-Identifier: LGPL-2.1-or-later
"""Authorize calls: root may do everything, users what is theirs, and whatever polkit allows them besides.

    what it is about        action of polkit
    a tree of one's own     org.ckptd1.checkpoint-own    freeze-own
    another tree            org.ckptd1.checkpoint        freeze
    an image of one's own   org.ckptd1.restore-own       manage-own-images
    another image           org.ckptd1.restore           manage-images

A tree of one's own that Yama keeps its owner from tracing takes org.ckptd1.trace-under-yama besides.

A caller in a sandbox (ckptd.kernel.confinement) reaches itself and what is below it: what is not, and every image,
takes org.ckptd1.leave-confinement first, root included, and then what it takes from others.

Of a tree the kernel then decides task by task, before the freeze and after it: for the caller, or for root where that
was allowed of another tree. Without polkit the first and third row are allowed, the others not. Each decision is a line
in the log.
"""

import contextlib
import os
from typing import Final, Literal, NamedTuple

import msgspec

from ckptd.bus.call import Call
from ckptd.bus.export import Viewer
from ckptd.bus.message import DBusError
from ckptd.bus.names import BUS_NAME
from ckptd.bus.polkit import SHORT, Polkit, PolkitAnswer
from ckptd.bus.registry import ERROR
from ckptd.errors import PermissionDenied
from ckptd.image.ids import is_image_id
from ckptd.jobs.audit import audit
from ckptd.jobs.held_freezes import not_held
from ckptd.jobs.images import ImageRights
from ckptd.jobs.requests import parse_target
from ckptd.jobs.spool import Spool
from ckptd.jobs.state import JobRecord
from ckptd.jobs.visibility import Visibility
from ckptd.kernel.confinement import hint_for, listed
from ckptd.protocol.messages import Caller

Verb = Literal['checkpoint', 'restore', 'freeze', 'manage']
# what an own tree and another one take
ACTIONS: Final[dict[Verb, tuple[str, str]]] = {
    'checkpoint': ('checkpoint-own', 'checkpoint'), 'freeze': ('freeze-own', 'freeze'),
    'restore': ('restore-own', 'restore'), 'manage': ('manage-own-images', 'manage-images')}
WORDS: Final = {PolkitAnswer.NO: 'polkit does not allow it', PolkitAnswer.DISMISSED: 'the question was dismissed',
                PolkitAnswer.ABSENT: 'it is not theirs, and there is no polkit to allow it',
                PolkitAnswer.SILENT: 'polkit does not answer'}
LEAVE_WORDS: Final = {PolkitAnswer.ABSENT: 'there is no polkit to allow it'}
LEAVE: Final = f'{BUS_NAME}.leave-confinement'
TRACE: Final = f'{BUS_NAME}.trace-under-yama'
PARTLY: Final = 'not all of which is theirs'


class TreeRights(NamedTuple):
    """caller: with whose rights the work is done. asker: uid of who asked for it. start_time: of the process that a
    target pid:N was before anybody was asked, 0 for other targets."""
    caller: Caller
    asker: int
    start_time: int


class Authorizer:
    """Made for one bus."""

    def __init__(self, polkit: Polkit, spool: Spool, visibility: Visibility) -> None:
        self._polkit, self._spool, self._visibility = polkit, spool, visibility

    async def enter(self, call: Call, verb: Verb, what: str, *, owner: int | None, task: int = 0, refusal: str = '',
                    hint: str | None = None, outside: bool = True) -> Caller:
        """With whose rights the work is to be done: the caller's for what is owned by its uid, root's where that was
        allowed for what is not. what: 'pid:12' or 'image X'. owner: None for what may not even be there. task: whose
        owner that is. refusal: what a caller who is not the owner is told. outside: where a confined one may not reach.

        PermissionDenied with the rule; InteractiveAuthorizationRequired where a person would have to be asked;
        LimitsExceeded where too many are.
        """
        caller = await call.credentials()
        if caller.confinement and outside:
            caller = await self._leave_confinement(call, caller, verb, what)
        own = owner == caller.uid
        action = f'{BUS_NAME}.{ACTIONS[verb][0 if own else 1]}'
        if not caller.uid:
            audit_call('allowed', call, caller, what, 'root')
            return caller
        async with call.attended():
            details = {'target': what} if owner is None else {'target': what, 'owner': str(owner)}
            answer = await self._polkit.ask(call.sender, caller.uid, action, details, interactive=call.interactive)
        if answer == PolkitAnswer.YES or (own and answer == PolkitAnswer.ABSENT):
            audit_call('allowed', call, caller, what, action if answer == PolkitAnswer.YES else 'owner')
            return caller if own else _as_root(caller)
        audit_call('refused', call, caller, what, action)
        refusal = '' if own else refusal or f'which belongs to uid {owner}'
        if answer == PolkitAnswer.ASK:
            raise _takes_a_person(what + (refusal and f', {refusal},'), action)
        words = f'uid {caller.uid} may not {verb} {what}' + (refusal and f', {refusal}')
        raise PermissionDenied(f'{words} ({action}: {WORDS[answer]})', task=task, resource=action,
                               hint='try again' if answer == PolkitAnswer.SILENT else hint)

    async def _leave_confinement(self, call: Call, caller: Caller, verb: Verb, what: str) -> Caller:
        """The caller as one who may act beyond its sandbox, which an administrator decides. Errors as of `enter`."""
        answer = PolkitAnswer.NO
        if caller.uid:      # polkit lets root do everything, and that of a container is root, too
            async with call.attended():
                answer = await self._polkit.ask(call.sender, caller.uid, LEAVE, {'target': what},
                                                interactive=call.interactive)
        if answer == PolkitAnswer.YES:
            audit_call('allowed', call, caller, what, LEAVE)
            return msgspec.structs.replace(caller, confinement=(), no_new_privs=False, seccomp=False)
        audit_call('refused', call, caller, what, LEAVE)
        outside = f'which is outside of what the caller may reach, confined by {listed(caller.confinement)}'
        if answer == PolkitAnswer.ASK:
            raise _takes_a_person(f'{what}, {outside},', LEAVE)
        rule = LEAVE_WORDS.get(answer, WORDS[answer]) if caller.uid else 'root is not asked, and not let out of one'
        raise PermissionDenied(f'uid {caller.uid} may not {verb} {what}, {outside} ({LEAVE}: {rule})',
                               resource='confinement',
                               hint='try again' if answer == PolkitAnswer.SILENT else hint_for(caller.confinement))

    def own(self, call: Call, caller: Caller, what: str) -> None:
        """Log that a caller ends something it has started. No authorization is needed."""
        audit_call('allowed', call, caller, what, 'owner' if caller.uid else 'root')

    async def tree(self, call: Call, verb: Verb, target: str, *, as_root: bool = False) -> TreeRights:
        """Authorize an operation on a tree. as_root: the caller asks for the rights of root. NoSuchTarget."""
        caller = await call.credentials()
        where = parse_target(target, caller)
        async with call.attended() if caller.uid else contextlib.nullcontext():
            owner, pid, start_time, outside = await self._visibility.whose(where, caller)
        refusal = '' if pid else PARTLY
        if as_root and owner == caller.uid:
            owner, refusal = None, 'which takes the rights of root'
        may = await self.enter(call, verb, where, owner=owner, task=pid, refusal=refusal,
                               hint='run as the owner of the tree, or as root', outside=outside)
        return TreeRights(may, caller.uid, start_time)

    async def traces(self, call: Call, caller: Caller, target: str, start_time: int = 0, *,
                     interactive: bool = True) -> bool:
        """Whether the caller's worker may trace what Yama keeps the caller from tracing; nobody is asked where that is
        nothing. Where polkit does not allow it, the worker will be told by the kernel, and name the rule. interactive:
        a person may be asked, and where none may be although one must, that is an error.

        InteractiveAuthorizationRequired, LimitsExceeded, NoSuchTarget.
        """
        if not caller.uid or os.geteuid():      # root's worker need not ask; that of a user has nothing to give
            return False
        what = parse_target(target, caller)
        async with call.attended():
            if not await self._visibility.is_kept_by_yama(what, start_time, caller):
                return False
            answer = await self._polkit.ask(call.sender, caller.uid, TRACE, {'target': what},
                                            interactive=interactive and call.interactive)
        audit_call('allowed' if answer == PolkitAnswer.YES else 'refused', call, caller, what, TRACE)
        if answer == PolkitAnswer.ASK and interactive:
            raise _takes_a_person(f'{what}, which Yama keeps its owner from tracing,', TRACE)
        return answer == PolkitAnswer.YES

    async def hold(self, call: Call, where: str, owner: int | None) -> Viewer:
        """Authorize a thaw; returns what the caller may see. owner: uid that froze the target, or None. A caller that
        may not see the freeze gets the same error either way. NoSuchTarget."""
        caller = await call.credentials()
        if caller.confinement and await self._visibility.is_outside(where, caller):
            caller = await self._leave_confinement(call, caller, 'freeze', where)
        if not caller.uid or owner == caller.uid:
            self.own(call, caller, where)
            return Viewer(caller.uid)
        viewer = await call.viewer()
        if not viewer.all:
            try:
                await self.enter(call, 'freeze', where, owner=None, outside=False,
                                 refusal=f'which uid {caller.uid} has not frozen')
            except PermissionDenied as error:
                raise not_held(where) from error
        elif owner is not None:
            await self.enter(call, 'freeze', where, owner=owner, outside=False)
        return viewer

    async def job(self, call: Call, verb: Verb, job: JobRecord) -> None:
        """Authorize the end of a job."""
        caller, request = await call.credentials(), job.request
        outside = bool(caller.confinement) and ((request.caller.pid, request.caller.start_time)
                                                != (caller.pid, caller.start_time))
        if outside:
            await self._leave_confinement(call, caller, verb, job.name)
        if caller.uid == request.asked_by:
            self.own(call, caller, job.name)
        else:
            await self.enter(call, verb, job.name, owner=request.asked_by, outside=False)

    async def image(self, call: Call, verb: Verb, image: str) -> ImageRights:
        """Authorize an operation on an image. A caller that may not see an image gets the error for one that does not
        exist. NoSuchImage."""
        caller = await call.credentials()
        info = self._spool.get(image)
        if info is None and (not caller.uid or not is_image_id(image)):
            self._spool.find(image)
        may = await self.enter(call, verb, f'image {image}', owner=None if info is None else info.owner,
                               refusal=f'of which uid {caller.uid} has none', hint='ckptctl images shows what there is')
        return ImageRights(may, caller)

    async def sees_all(self, sender: str, uid: int) -> bool:
        """Whether polkit lets the sender see the images and jobs of others. Nobody is asked but by a call that waits
        for it. LimitsExceeded."""
        action = f'{BUS_NAME}.{ACTIONS["manage"][1]}'
        return await self._polkit.ask(sender, uid, action, {}, patience=SHORT) == PolkitAnswer.YES


def _takes_a_person(what: str, action: str) -> DBusError:
    """The error for a call that does not let polkit ask somebody."""
    return DBusError(f'{ERROR}InteractiveAuthorizationRequired',
                     f'{what} takes an authorization ({action}) that a person must give')


def _as_root(caller: Caller) -> Caller:
    """Root's rights for what root's rights are needed for; the pid still says who asked, and from which sandbox."""
    return Caller(0, 0, (0,), caller.pid, label=caller.label, start_time=caller.start_time,
                  confinement=caller.confinement)


def audit_call(decision: Literal['allowed', 'refused'], call: Call, caller: Caller, what: str, rule: str) -> None:
    call.audited = True
    audit(decision, rule, method=call.message.member, uid=caller.uid, pid=caller.pid, sender=call.sender,
          label=caller.label, what=what)
