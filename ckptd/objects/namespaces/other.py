# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces for which there is no file in this package, such as mnt, net and ipc. A restart in ours is refused."""

from ckptd.objects.namespaces.base import NamespaceKind


class OtherNamespace(NamespaceKind):
    """A namespace of any other name."""

    def __init__(self, name: str) -> None:
        self.name = name
