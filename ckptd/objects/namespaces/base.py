# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of a kind of namespace.

A kind is one class in one file of this package, found by registry.py. No other module names it, but birth.py. The
record is the same for all kinds (image.records.Namespace). The hooks in life order:

    complete(links)             adds what the links of a task in /proc/PID/ns do not show
    is_lost(one, ...)           whether a restart would be without it, known at the dump already

and for a restart:

    is_made(birth)              whether a restart makes it
    restart_findings(one, ...)  the reason why it cannot be had again, or what will be lost; changes nothing
    enter(birth, bootstrap)     lets the first stub make it, before there is any other
"""

from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ckptd.errors import Finding
from ckptd.image.records import Namespace
from ckptd.kernel.timens import Offsets
from ckptd.objects.attributes.base import about
from ckptd.remote.batch import Batch
from ckptd.remote.stub import Stub

FOR_CHILDREN = '_for_children'      # end of the name of a link: the namespace that children will be born into


@dataclass(frozen=True, slots=True)
class BirthNamespaces:
    """The namespaces that a tree is born into."""
    user: bool                         # a new user namespace
    pid: bool                          # a new pid namespace
    clocks: Offsets | None             # offsets in nanoseconds for a new time namespace, None for ours
    bootstrap_is_init: bool = False    # our first child is process 1 of the pid namespace


class NamespaceKind(ABC):
    """One kind of namespace: `class PidNamespace(NamespaceKind, name='pid')`. name: of the link in /proc/PID/ns."""
    name: str
    is_first: ClassVar[bool] = False        # `enter` comes before that of others, which need its capabilities
    is_only_shown: ClassVar[bool] = False   # programs that depend on it only show it

    def __init_subclass__(cls, *, name: str = '') -> None:
        super().__init_subclass__()
        cls.name = name

    def complete(self, links: dict[str, int]) -> None:
        return

    def is_made(self, birth: BirthNamespaces) -> bool:
        return False

    def is_lost(self, one: Namespace, birth: BirthNamespaces) -> bool:
        """Whether a tree of that namespace comes back in another one, if we are not in it."""
        return not (one.own or one.name != self.name or self.is_made(birth))

    def restart_findings(self, one: Namespace, vpid: int, birth: BirthNamespaces, *, is_ours: bool
                         ) -> Iterable[Finding]:
        """Yield findings about a namespace of the image. vpid: of the root. is_ours: we are in this namespace."""
        if is_ours or not self.is_lost(one, birth):
            return
        if self.is_only_shown:
            yield about(vpid, f'namespace {self.name}', 'EOPNOTSUPP', f'was in another {self.name} namespace, and '
                        'comes back in ours', 'start the restore inside a similar one', 'warning')
        else:
            yield about(vpid, f'namespace {self.name}', 'EOPNOTSUPP', f'was in another {self.name} namespace, which '
                        'is not made again', 'checkpoint and restore it from inside that namespace (nsenter)')

    def enter(self, birth: BirthNamespaces, bootstrap: Stub) -> Iterable[Finding]:
        """Yield warnings. CkptError if a namespace is required and not available."""
        return ()


def unshare_stub(bootstrap: Stub, flags: int) -> None:
    """Let a stub call unshare(2). OSError."""
    batch = Batch()
    batch.call('unshare', flags)
    bootstrap.do(batch)
