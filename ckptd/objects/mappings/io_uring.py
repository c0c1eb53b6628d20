# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory of an io_uring that a program has mapped. objects/files/io_uring.py has the ring and its content."""

from mmap import MAP_SHARED

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.records import IO_URING, Vma
from ckptd.kernel.fdinfo import list_fds, read_fdinfo
from ckptd.kernel.io_uring import IORING_OFF_CQ_RING, IORING_OFF_SQ_RING, IORING_OFF_SQES, RING_LINK
from ckptd.kernel.maps import Mapping
from ckptd.kernel.task import read_link
from ckptd.objects.files.base import finding
from ckptd.objects.mappings.base import RELEASE, MappedSpace, MappingKind, MappingMeans, View, label
from ckptd.objects.support import Support
from ckptd.remote.script import Script

_PARTS = (IORING_OFF_SQ_RING, IORING_OFF_CQ_RING, IORING_OFF_SQES)


class IoUringMapping(MappingKind, numbers=[IO_URING], names=[RING_LINK]):
    """A part of a ring. Vma.object is the inode of the ring's file."""
    support = Support('mapped memory of an io_uring', refused='a ring whose file the process has closed; a part of a '
                                                              'mapping; rings of provided buffers')
    is_special = True
    is_placed = True

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        if mapping.offset not in _PARTS:
            return finding('EOPNOTSUPP', 'provided buffers of an io_uring, or a part of one of its mappings',
                           RELEASE)
        if not any(read_link(tid, f'fd/{fd}') == RING_LINK and read_fdinfo(tid, fd).ino == mapping.inode
                   for fd in list_fds(tid)):
            return finding('EOPNOTSUPP', 'a ring of an io_uring whose file descriptor is closed', RELEASE)
        return None

    def object_of(self, view: View) -> tuple[int, int]:
        return IO_URING, view.mapping.inode

    def map(self, vma: Vma, protection: int, script: Script, space: MappedSpace) -> None:
        script.call('mmap', 0, vma.end - vma.start, protection, MAP_SHARED, self.open(vma, space.means), vma.offset,
                    about=label(vma), expect=vma.start)

    def fd(self, number: int, means: MappingMeans, *, writable: bool) -> int:
        return means.files.once(('io_uring', number), lambda: _lost(number))


def _lost(inode: int) -> int:
    raise ImageDamaged(f'a mapping of io_uring {inode}, which the image does not have', resource='memory.img')
