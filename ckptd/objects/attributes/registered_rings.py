# SPDX-License-Identifier: LGPL-2.1-or-later
"""io_urings that a thread uses by a number of its own instead of a file descriptor (IORING_REGISTER_RING_FDS of
io_uring_register(2)). No interface tells which ring has which number, so they are refused."""

from ckptd.errors import NotSupported
from ckptd.image.grammar import Struct
from ckptd.kernel.io_uring import IO_RINGFD_REG_MAX, IORING_ENTER_REGISTERED_RING
from ckptd.objects.attributes.base import Attribute, DumpedTask, Reader
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch
from ckptd.tree import Task


class RegisteredRings(Attribute[Struct, int], name='registered rings'):
    support = Support('io_urings that a thread has registered', dumped='no', restored='no', refused='all')

    def ask(self, batch: Batch) -> Reader[int]:
        """Submit nothing to each number, which fails if it has no ring."""
        calls = [batch.call('io_uring_enter', number, 0, 0, IORING_ENTER_REGISTERED_RING, 0, 0)
                 for number in range(IO_RINGFD_REG_MAX)]
        return lambda results: sum(results.values[call] >= 0 for call in calls)

    def require(self, task: Task, answer: int) -> None:
        if answer:
            raise NotSupported(f'{task.comm}[{task.tid}] has {answer} io_urings registered for itself', task=task.tid,
                               resource='io_uring', phase='state',
                               hint='let the program use them by their file descriptors (without '
                                    'io_uring_register_ring_fd)')

    def dump(self, of: DumpedTask, answer: int) -> None:
        return None
