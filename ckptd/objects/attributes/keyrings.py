# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keyrings of a thread and of its process (keyrings(7)), whose keys no other process can read. They are not restored.
The session keyring is that of the restart."""

from collections.abc import Iterable

from ckptd.errors import Finding
from ckptd.image.grammar import U8, Struct, layout
from ckptd.image.reader import ImageTask
from ckptd.kernel.keyctl import KEY_SPEC_PROCESS_KEYRING, KEY_SPEC_THREAD_KEYRING, KEYCTL_GET_KEYRING_ID
from ckptd.objects.attributes.base import Attribute, DumpedTask, Reader, RestartRights, about
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch

_NAMES = ('thread', 'process')


@layout
class Keyrings(Struct):
    """Keyrings that the thread had. mask: 1 of the thread, 2 of the process."""
    mask: U8


class KeyringsAttribute(Attribute[Keyrings, int], name='keyrings'):
    support = Support('keyrings of threads and processes', dumped='no', restored='no', warned='the keys')

    def ask(self, batch: Batch) -> Reader[int]:
        calls = [batch.call('keyctl', KEYCTL_GET_KEYRING_ID, which, 0, 0, 0)
                 for which in (KEY_SPEC_THREAD_KEYRING, KEY_SPEC_PROCESS_KEYRING)]
        # ENOKEY without one
        return lambda results: sum(1 << bit for bit, call in enumerate(calls) if results.or_else(call, 0))

    def dump(self, of: DumpedTask, answer: int) -> Keyrings | None:
        return Keyrings(answer) if answer else None

    def obstacles(self, record: Keyrings, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        names = ' and its '.join(name for bit, name in enumerate(_NAMES) if record.mask >> bit & 1)
        yield about(task.vpid, 'keyrings', 'ENOKEY', f'had a keyring of its {names}', 'the keys are lost: let the '
                    'program add them again', 'warning')
