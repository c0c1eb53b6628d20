# SPDX-License-Identifier: LGPL-2.1-or-later
"""The broker's answer to FindWatched. open_by_handle_at(2) requires CAP_DAC_READ_SEARCH, which no user's worker has.

The handles come from fdinfo, never from the worker. The kernel decides with the rights of the user, and without any
capability, whether fdinfo may be read, and whether the path that the kernel shows leads to that file. A user learns no
name in a directory that they cannot list.
"""

import errno
import os
from contextlib import nullcontext
from functools import partial

from ckptd.kernel.creds import file_rights
from ckptd.kernel.fdinfo import read_fdinfo
from ckptd.kernel.inotify import watches_of
from ckptd.kernel.task import read_link
from ckptd.objects.files.watched import INOTIFY_LINK, paths_by_handle
from ckptd.protocol.broker_calls import FindWatched
from ckptd.protocol.messages import MAX_MESSAGE
from ckptd.worker.broker.identity import Identity

_MOST = 10_000              # watches for each call
_MAX_WATCHES = 100_000      # of an instance; a call reads all of them again
_ROOM = MAX_MESSAGE // 2    # bytes of paths in an answer


def find_watched(call: FindWatched, identity: Identity, worker: int) -> dict[str, object]:
    """Return 'paths', pairs of a wd and a path in bytes, and 'more': the `after` of the next call, or 0. OSError."""
    as_user = partial(file_rights, identity.uid, identity.gid, identity.groups)

    if call.tid == os.getpid() != worker:
        # the kernel lets every process inspect itself
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    # a file in flight is the worker's, which is not dumpable, and has no other files than the user's
    with nullcontext() if call.tid == worker else as_user():
        if read_link(call.tid, f'fd/{call.fd}') != INOTIFY_LINK:
            raise OSError(errno.EINVAL, 'not an inotify instance')
        watches = watches_of(read_fdinfo(call.tid, call.fd))
    if len(watches) > _MAX_WATCHES:
        raise OSError(errno.E2BIG, f'more than {_MAX_WATCHES:,} watches')
    left = [watch for watch in watches if watch.wd > call.after]
    found = paths_by_handle(call.seen_by, left[:_MOST], as_user)
    paths: list[tuple[int, bytes]] = []
    room = _ROOM
    for wd, path in sorted(found.items()):
        paths.append((wd, os.fsencode(path)))
        room -= len(paths[-1][1]) + 16
        if room < 0:
            return {'paths': paths, 'more': wd}
    return {'paths': paths, 'more': left[_MOST - 1].wd if len(left) > _MOST else 0}
