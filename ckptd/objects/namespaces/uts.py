# SPDX-License-Identifier: LGPL-2.1-or-later
"""UTS namespaces (uts_namespaces(7)): the names of the host. They are not made."""

from ckptd.objects.namespaces.base import NamespaceKind
from ckptd.objects.support import Support


class UtsNamespace(NamespaceKind, name='uts'):
    """A UTS namespace."""
    support = Support('uts', restored='no', warned='the tree is in that of the restart')
    is_only_shown = True
