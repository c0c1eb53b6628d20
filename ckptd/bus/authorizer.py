# SPDX-License-Identifier: LGPL-2.1-or-later
"""Authorize calls. Root may do everything, users what is theirs; for anything else polkit decides.

    object                   action of polkit
    own tree                 org.ckptd1.checkpoint-own    freeze-own
    another user's tree      org.ckptd1.checkpoint        freeze
    own image                org.ckptd1.restore-own       manage-own-images
    another user's image     org.ckptd1.restore           manage-images

If Yama keeps users from tracing their own tree, org.ckptd1.trace-under-yama is needed as well.

A caller in a sandbox (ckptd.kernel.confinement) reaches itself and the tasks below it. For anything else, and for every
image, it first needs org.ckptd1.leave-confinement, even as root, and then the action for another user's object.

For a tree the kernel then decides task by task, before the freeze and after it. It decides with the caller's rights, or
with root's if the action for another tree was granted. Without polkit, the rows of own trees and images are allowed and
the others are not. Each decision is logged in one line.
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
from ckptd.jobs.requests import target_for
from ckptd.jobs.spool import Spool
from ckptd.jobs.state import JobRecord
from ckptd.jobs.visibility import Visibility
from ckptd.kernel.confinement import hint_for, listed
from ckptd.protocol.requests import Caller
from ckptd.target import AnyTarget, Target

Verb = Literal['checkpoint', 'restore', 'freeze', 'manage']
# actions for an own object and for another user's
ACTIONS: Final[dict[Verb, tuple[str, str]]] = {
    'checkpoint': ('checkpoint-own', 'checkpoint'), 'freeze': ('freeze-own', 'freeze'),
    'restore': ('restore-own', 'restore'), 'manage': ('manage-own-images', 'manage-images')}
WORDS: Final = {PolkitAnswer.NO: 'polkit does not allow it', PolkitAnswer.DISMISSED: 'the question was dismissed',
                PolkitAnswer.ABSENT: 'it belongs to another user, and there is no polkit to allow it',
                PolkitAnswer.SILENT: 'polkit does not answer'}
LEAVE_WORDS: Final = {PolkitAnswer.ABSENT: 'there is no polkit to allow it'}
LEAVE: Final = f'{BUS_NAME}.leave-confinement'
TRACE: Final = f'{BUS_NAME}.trace-under-yama'
STOP: Final = 'org.freedesktop.systemd1.manage-units'
STOP_WORDS: Final = {**WORDS, PolkitAnswer.ABSENT: 'there is no polkit to allow it'}
PARTLY: Final = 'not all of which is theirs'


class TreeRights(NamedTuple):
    """The rights with which an operation on a tree is done."""
    target: Target     # the tree
    caller: Caller     # the work is done with these rights
    asker: int         # uid of the user who asked
    start_time: int    # start time of the process of a ProcessTarget when the call came in; 0 for other targets


class Authorizer:
    """The authorizer of one bus."""

    def __init__(self, polkit: Polkit, spool: Spool, visibility: Visibility) -> None:
        self._polkit, self._spool, self._visibility = polkit, spool, visibility

    async def enter(self, call: Call, verb: Verb, what: str, *, owner: int | None, task: int = 0, refusal: str = '',
                    hint: str | None = None, outside: bool = True) -> Caller:
        """Authorize a call and return the rights for its work: the caller's own, or root's if polkit granted access to
        another user's object.

        what: 'pid:12' or 'image X'. owner: uid of the object's owner, None for an object that may not even exist. task:
        the task that the owner belongs to. refusal: words for a caller who is not the owner. outside: the object is
        beyond what a confined caller may reach.

        PermissionDenied with the rule; InteractiveAuthorizationRequired where a person would have to be asked;
        LimitsExceeded where too many questions are open.
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
        """Return the caller as one that may act beyond its sandbox, if an administrator agrees. Errors as for
        `enter`."""
        answer = PolkitAnswer.NO
        if caller.uid:      # polkit allows root everything, and root of a container is root, too
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
        rule = LEAVE_WORDS.get(answer, WORDS[answer]) if caller.uid else 'root is never let out of a sandbox'
        raise PermissionDenied(f'uid {caller.uid} may not {verb} {what}, {outside} ({LEAVE}: {rule})',
                               resource='confinement',
                               hint='try again' if answer == PolkitAnswer.SILENT else hint_for(caller.confinement))

    def own(self, call: Call, caller: Caller, what: str) -> None:
        """Log that a caller ends something that it started. No authorization is needed."""
        audit_call('allowed', call, caller, what, 'owner' if caller.uid else 'root')

    async def tree(self, call: Call, verb: Verb, target: AnyTarget, *, as_root: bool = False) -> TreeRights:
        """Authorize an operation on a tree. as_root: the caller asks for root's rights. NoSuchTarget."""
        caller = await call.credentials()
        where = target_for(target, caller)
        async with call.attended() if caller.uid else contextlib.nullcontext():
            owner, pid, start_time, outside = await self._visibility.whose(where, caller)
        refusal = '' if pid else PARTLY
        if as_root and owner == caller.uid:
            owner, refusal = None, "which needs root's rights"
        may = await self.enter(call, verb, str(where), owner=owner, task=pid, refusal=refusal,
                               hint='run as the owner of the tree, or as root', outside=outside)
        return TreeRights(where, may, caller.uid, start_time)

    async def traces(self, call: Call, caller: Caller, target: Target, start_time: int = 0, *,
                     interactive: bool = True) -> bool:
        """Whether the caller's worker may trace tasks that Yama keeps the caller from tracing. False, without a
        question, where Yama restricts nothing.

        If polkit does not allow it, the worker runs anyway; the kernel then refuses and the error names the rule.
        interactive: a person may be asked. If one must be asked and this is False, that is an error.

        InteractiveAuthorizationRequired, LimitsExceeded, NoSuchTarget.
        """
        # root's worker needs no permission, and a user's daemon has no rights to give
        if not caller.uid or os.geteuid():
            return False
        async with call.attended():
            if not await self._visibility.is_kept_by_yama(target, start_time, caller):
                return False
            answer = await self._polkit.ask(call.sender, caller.uid, TRACE, {'target': str(target)},
                                            interactive=interactive and call.interactive)
        audit_call('allowed' if answer == PolkitAnswer.YES else 'refused', call, caller, str(target), TRACE)
        if answer == PolkitAnswer.ASK and interactive:
            raise _takes_a_person(f'{target}, which Yama keeps its owner from tracing,', TRACE)
        return answer == PolkitAnswer.YES

    async def stop(self, call: Call, tree: TreeRights) -> None:
        """Authorize the stop of a unit, as systemd would. Root's daemon asks systemd for it, so polkit is asked about
        the user who called. PermissionDenied, InteractiveAuthorizationRequired, LimitsExceeded."""
        # the manager of a user's daemon is that user's
        if not tree.asker or os.geteuid():
            return
        async with call.attended():
            answer = await self._polkit.ask(call.sender, tree.asker, STOP, {'unit': str(tree.target), 'verb': 'stop'},
                                            interactive=call.interactive)
        audit_call('allowed' if answer == PolkitAnswer.YES else 'refused', call, tree.caller, str(tree.target), STOP)
        if answer == PolkitAnswer.ASK:
            raise _takes_a_person(f'the stop of {tree.target}', STOP)
        if answer != PolkitAnswer.YES:
            raise PermissionDenied(f'uid {tree.asker} may not stop {tree.target} ({STOP}: {STOP_WORDS.get(answer)})',
                                   resource=STOP, hint='name its main process, pid:N; for systemd that then fails')

    async def hold(self, call: Call, where: Target, owner: int | None) -> Viewer:
        """Authorize a thaw. Return what the caller may see. `owner` is the uid that froze the target, or None. A caller
        who may not see the freeze gets the same error either way. NoSuchTarget."""
        caller = await call.credentials()
        if caller.confinement and await self._visibility.is_outside(where, caller):
            caller = await self._leave_confinement(call, caller, 'freeze', str(where))
        if not caller.uid or owner == caller.uid:
            self.own(call, caller, str(where))
            return Viewer(caller.uid)
        viewer = await call.viewer()
        if not viewer.all:
            try:
                await self.enter(call, 'freeze', str(where), owner=None, outside=False,
                                 refusal=f'which uid {caller.uid} did not freeze')
            except PermissionDenied as error:
                raise not_held(where) from error
        elif owner is not None:
            await self.enter(call, 'freeze', str(where), owner=owner, outside=False)
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
        """Authorize an operation on an image. A caller who may not see an image gets the error for one that does not
        exist. NoSuchImage."""
        caller = await call.credentials()
        info = self._spool.get(image)
        if info is None and (not caller.uid or not is_image_id(image)):
            self._spool.find(image)
        may = await self.enter(call, verb, f'image {image}', owner=None if info is None else info.owner,
                               refusal=f'of which uid {caller.uid} has none', hint='"ckptctl list" shows your images')
        return ImageRights(may, caller)

    async def sees_all(self, sender: str, uid: int) -> bool:
        """Whether polkit lets the sender see other users' images and jobs. A person is asked only for a call that waits
        for the answer. LimitsExceeded."""
        action = f'{BUS_NAME}.{ACTIONS["manage"][1]}'
        return await self._polkit.ask(sender, uid, action, {}, patience=SHORT) == PolkitAnswer.YES


def _takes_a_person(what: str, action: str) -> DBusError:
    """Return the error for a call that does not let polkit ask a person."""
    return DBusError(f'{ERROR}InteractiveAuthorizationRequired',
                     f'{what} needs an authorization ({action}) that a person must give')


def _as_root(caller: Caller) -> Caller:
    """Return root's rights. The pid still names the process that asked, and its sandbox still counts."""
    return Caller(0, 0, (0,), caller.pid, label=caller.label, start_time=caller.start_time,
                  confinement=caller.confinement)


def audit_call(decision: Literal['allowed', 'refused'], call: Call, caller: Caller, what: str, rule: str) -> None:
    call.audited = True
    audit(decision, rule, method=call.message.member, uid=caller.uid, pid=caller.pid, sender=call.sender,
          label=caller.label, what=what)
