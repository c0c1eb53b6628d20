# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keyrings of a thread, of its process and of its session (keyrings(7)), whose keys no other process can read. They are
not restored. The session keyring is that of the restart."""

import struct
from collections.abc import Iterable

from ckptd.errors import Finding
from ckptd.image.grammar import U8, Struct, layout
from ckptd.image.reader import ImageTask
from ckptd.kernel.keyctl import (
    KEY_SPEC_PROCESS_KEYRING,
    KEY_SPEC_SESSION_KEYRING,
    KEY_SPEC_THREAD_KEYRING,
    KEY_SPEC_USER_KEYRING,
    KEY_SPEC_USER_SESSION_KEYRING,
    KEYCTL_GET_KEYRING_ID,
    KEYCTL_READ,
)
from ckptd.objects.attributes.base import Attribute, DumpedTask, Reader, RestartRights, about
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Results

_NAMES = ('thread', 'process', 'session')
_OF_SESSION = 1 << 2
_OWN = (KEY_SPEC_THREAD_KEYRING, KEY_SPEC_PROCESS_KEYRING)
# the user's own keyring comes first: a session without a keyring of its own uses that of the user's sessions
_SHARED = (KEY_SPEC_USER_KEYRING, KEY_SPEC_USER_SESSION_KEYRING, KEY_SPEC_SESSION_KEYRING)
_KEYS = 64          # bytes: more keys than tell that there are others than the user's keyring


@layout
class Keyrings(Struct):
    """Keyrings that the thread had. mask: 1 of the thread, 2 of the process, 4 of its session, with keys."""
    mask: U8


class KeyringsAttribute(Attribute[Keyrings, int], name='keyrings'):
    support = Support('keyrings of threads, processes and sessions', dumped='no', restored='no', warned='the keys')

    def ask(self, batch: Batch) -> Reader[int]:
        calls = [batch.call('keyctl', KEYCTL_GET_KEYRING_ID, which, 0, 0, 0) for which in _OWN]
        shared = [batch.call('keyctl', KEYCTL_GET_KEYRING_ID, which, 0, 0, 0) for which in _SHARED]
        keys = batch.buffer(_KEYS)
        size = batch.call('keyctl', KEYCTL_READ, KEY_SPEC_SESSION_KEYRING, keys, _KEYS, 0)

        def read(results: Results) -> int:
            # ENOKEY without one
            mask = sum(1 << bit for bit, call in enumerate(calls) if results.or_else(call, 0))
            user, of_user, own = (results.or_else(call, 0) for call in shared)
            length = min(results.or_else(size, 0), _KEYS) & ~3
            found = {key for key, in struct.iter_unpack('<i', results.data(keys)[:length])}
            return mask | (_OF_SESSION if own != of_user and found - {user} else 0)
        return read

    def dump(self, of: DumpedTask, answer: int) -> Keyrings | None:
        return Keyrings(answer) if answer else None

    def obstacles(self, record: Keyrings, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        names = ' and its '.join(name for bit, name in enumerate(_NAMES) if record.mask >> bit & 1)
        yield about(task.vpid, 'keyrings', 'ENOKEY', f'had a keyring of its {names}', 'the keys are lost: let the '
                    'program add them again', 'warning')
