# SPDX-License-Identifier: LGPL-2.1-or-later
"""Seals of mappings: nothing of a sealed mapping can be changed any more (mseal(2), since 6.10). The flags of a mapping
show its seal."""

from collections.abc import Iterable, Iterator

from ckptd.errors import Finding
from ckptd.image.records import Vma
from ckptd.kernel.mman import mseal
from ckptd.objects.mappings.base import MappingCheck, lacking
from ckptd.objects.support import Support
from ckptd.remote.script import Script

SUPPORT = Support('seals of mappings (mseal)')
_SEALED = 'sl'      # VmFlags of proc_pid_smaps(5)


def lacks(context: MappingCheck) -> Iterator[Finding]:
    """Yield a finding if this kernel has no seals and the image has."""
    mm_id = next((one.mm_id for one in context.reader.every(Vma) if _is_sealed(one)), 0)
    if mm_id and not _has_seals():
        yield lacking(context.mm_users.get(mm_id, 0), 'sealed mappings (mseal)', '6.10')


def restore(vmas: Iterable[Vma], script: Script) -> None:
    """Seal mappings again, as the last change of them."""
    for vma in vmas:
        if _is_sealed(vma):
            script.call('mseal', vma.start, vma.end - vma.start, 0, about='sealed mapping')


def _is_sealed(vma: Vma) -> bool:
    return _SEALED in vma.vm_flags.split()


def _has_seals() -> bool:
    try:
        mseal(0, 0)     # an empty range
    except OSError:
        return False
    return True
