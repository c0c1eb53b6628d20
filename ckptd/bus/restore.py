# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore and CheckRestore, common to the manager and the images."""

from collections.abc import Mapping
from typing import Any

from ckptd.bus.attach import attach
from ckptd.bus.authorizer import Authorizer
from ckptd.bus.call import Call
from ckptd.bus.job import path_of
from ckptd.bus.names import token_path
from ckptd.bus.options import CHECK_RESTORE, DETACHED, RESTORE, Option, parse_options
from ckptd.external import parse_what
from ckptd.jobs.images import ImageService


async def restore(image_service: ImageService, authorizer: Authorizer, call: Call, image: str,
                  options: Mapping[str, Any]) -> str:
    """Start the job. Return its path."""
    wishes, fds = _wishes(options, RESTORE)
    token, detach = wishes.pop('handle_token', ''), wishes.pop('detach', False)
    rights = await authorizer.image(call, 'restore', image)
    job = image_service.restore(image, rights, fds, token and token_path(call.sender, token), **wishes)
    if not detach:
        await attach(call, image_service.queue, job)
    return path_of(job)


async def check_restore(image_service: ImageService, authorizer: Authorizer, call: Call, image: str,
                        options: Mapping[str, Any]
                        ) -> list[dict[str, Any]]:
    """Return the rows of refusals and warnings."""
    wishes, fds = _wishes(options, CHECK_RESTORE)
    rights = await authorizer.image(call, 'restore', image)
    async with call.attended():
        return await image_service.check_restore(image, rights, fds, **wishes)


def _wishes(options: Mapping[str, Any], known: tuple[Option, ...]) -> tuple[dict[str, Any], list[int]]:
    """Return fields of RestoreRequest and the fds that go with them. A receiver that keeps the fds duplicates them."""
    given = parse_options(options, known)
    terminal, inherited = given.pop('terminal', None), given.pop('inherit', ())
    given['inherit'] = tuple(parse_what(what) for what, _ in inherited)
    fds = [fd for _, fd in inherited]
    if terminal == DETACHED:
        return {**given, 'detach_terminal': True}, fds
    return given, fds if terminal is None else [terminal, *fds]
