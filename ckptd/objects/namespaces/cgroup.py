# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cgroup namespaces (cgroup_namespaces(7)): the root of the paths of cgroups. They are not made."""

from ckptd.objects.namespaces.base import NamespaceKind
from ckptd.objects.support import Support


class CgroupNamespace(NamespaceKind, name='cgroup'):
    """A cgroup namespace."""
    support = Support('cgroup', restored='no', warned='the tree is in that of the restart')
    is_only_shown = True
