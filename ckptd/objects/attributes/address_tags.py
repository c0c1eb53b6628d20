# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tagged addresses (LAM of x86-64, ARCH_ENABLE_TAGGED_ADDR of arch_prctl(2)). They are refused."""

from ckptd.errors import Finding
from ckptd.image.grammar import Struct
from ckptd.kernel.status import NO_TAGS, Status
from ckptd.objects.attributes.base import Attribute, DumpedTask, Scope
from ckptd.objects.support import Support
from ckptd.tree import Task


class AddressTags(Attribute[Struct, None], name='address tags', scope=Scope.MM):
    support = Support('tagged addresses (LAM)', dumped='no', restored='no', refused='all')

    def findings(self, task: Task, status: Status) -> list[Finding]:
        if status.untag_mask == NO_TAGS:
            return []
        return [Finding(task.tid, task.comm, 'address tags', 'EOPNOTSUPP', 'uses tagged addresses (LAM), untag_mask '
                        f'{status.untag_mask:#x}', 'a program that enables them with arch_prctl(2) cannot be '
                        'checkpointed yet')]

    def dump(self, of: DumpedTask, answer: None) -> None:
        return None
