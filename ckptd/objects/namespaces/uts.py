# SPDX-License-Identifier: LGPL-2.1-or-later
"""UTS namespaces (uts_namespaces(7)): the names of the host. They are not made."""

from ckptd.objects.namespaces.base import NamespaceKind


class UtsNamespace(NamespaceKind, name='uts'):
    """A UTS namespace."""
    is_only_shown = True
