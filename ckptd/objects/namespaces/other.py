# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces for which there is no file in this package, such as mnt, net and ipc. A restart in ours is refused."""

from ckptd.objects.namespaces.base import NamespaceKind
from ckptd.objects.support import Support


class OtherNamespace(NamespaceKind):
    """A namespace of any other name."""
    support = Support('mnt, net and ipc', restored='no', refused='others than those of the restart')

    def __init__(self, name: str) -> None:
        self.name = name
