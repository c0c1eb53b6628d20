# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file that is open with O_PATH. Such a description refers to a file and does not give access to its content. The
file may be a symbolic link.

A deleted file is made again: a symbolic link with its target, a directory, a device node, or a regular file with its
content. Other descriptions of the tree share that file.
"""

import os
import stat

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.objects.files.base import (
    Content,
    FileLookup,
    Kind,
    Needs,
    OpenFile,
    RestoreContext,
    finding,
    of_process,
    open_again,
    opening,
)
from ckptd.objects.files.content import ContentSegment, dump_content, owner_findings
from ckptd.objects.files.dead_process import is_of_dead_process
from ckptd.objects.files.deleted import (
    deleted_file,
    deleted_findings,
    deleted_takes,
    device_findings,
    flag_findings,
    make_device,
    make_symlink,
    removed_directory,
)
from ckptd.objects.files.hidden import hidden_findings
from ckptd.objects.files.linked import DeletedFile, link_findings
from ckptd.objects.support import Support

_MADE_AGAIN = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK})
_NAMES = {stat.S_IFIFO: 'FIFO', stat.S_IFSOCK: 'socket'}


@layout
class PathReference(Struct):
    """A file that is open with O_PATH."""
    path: str
    device: U64
    inode: U64
    size: U64
    mode: U32
    uid: U32
    gid: U32
    device_number: U64      # of a device node
    deleted: U8
    target: str             # of a symbolic link
    content: tuple[ContentSegment, ...]     # of a deleted regular file without another name
    link: str = ''          # of a deleted regular file with another name, see Regular

    @property
    def format(self) -> int:
        """The file type: S_IFREG ..."""
        return stat.S_IFMT(self.mode)


class PathKind(Kind[PathReference], tag='path'):
    support = Support('references without access (O_PATH)', dumped='name',
                      refused='those without a path: of pipes, sockets and memfds, and of deleted FIFOs and sockets',
                      user='deleted nodes of devices are refused')

    def matches(self, file: OpenFile) -> bool:
        # pipes, sockets and internal files of the kernel have a link in /proc that is not a path
        return (file.is_path and file.link.startswith('/') and not file.link.startswith('/memfd:')
                and not is_of_dead_process(file))

    def findings(self, file: OpenFile) -> list[Finding]:
        if file.deleted:
            return self._deleted(file)
        return hidden_findings(file)

    def _deleted(self, file: OpenFile) -> list[Finding]:
        sort = stat.S_IFMT(file.stat.st_mode)
        if sort not in _MADE_AGAIN:
            return [finding('EOPNOTSUPP', f'{file.path} is a deleted {_NAMES.get(sort, "file")}, open with O_PATH',
                            'close it before the checkpoint')]
        if sort == stat.S_IFREG and file.stat.st_nlink:
            return link_findings(DeletedFile.of(file))
        if sort == stat.S_IFREG and not os.access(file.proc_path, os.R_OK, effective_ids=True):
            return [finding('EACCES', f'{file.path} is deleted and its content cannot be read',
                            'run as root, or give the file a name (ln) before the checkpoint')]
        return flag_findings(file) if sort == stat.S_IFREG else []

    def dump(self, file: OpenFile, content: Content) -> PathReference:
        of, link, segments = file.stat, '', tuple[ContentSegment, ...]()
        if file.deleted and stat.S_ISREG(of.st_mode):
            if of.st_nlink:
                link = content.link_back(file)
            else:
                with file.reopen(os.O_RDONLY) as fd:
                    segments = dump_content(fd, of.st_size, content)
        return PathReference(file.path, of.st_dev, of.st_ino, of.st_size, of.st_mode, of.st_uid, of.st_gid, of.st_rdev,
                             file.deleted, _target(file), segments, link)

    # ------------------------------------------------------------ restart

    def late(self, record: PathReference, saved: SavedFile) -> bool:
        return of_process(record.path)

    def restart_findings(self, record: PathReference, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if self.late(record, saved):
            return []       # its process is not yet made
        if record.deleted and not record.link:
            return self._deleted_findings(record, lookup)
        found = lookup.lstat(record.link or record.path)
        if found is None or (record.link and found.st_ino != record.inode):
            return [finding('ENOENT', f'{record.link or record.path} is missing', 'put the file back where it was')]
        if stat.S_IFMT(found.st_mode) != record.format or found.st_rdev != record.device_number:
            return [finding('ESTALE', f'{record.path} is a file of another type now', 'put the file back')]
        if found.st_ino != record.inode:
            return [finding('ESTALE', f'{record.path} is another file (inode {found.st_ino}, not {record.inode})',
                            'a program that compares inodes notices', 'warning')]
        return []

    def _deleted_findings(self, record: PathReference, lookup: FileLookup) -> list[Finding]:
        rows = [*deleted_findings(record.path, lookup),
                *owner_findings(record.path, record.uid, record.gid, lookup)]
        if record.format in (stat.S_IFCHR, stat.S_IFBLK):
            rows += device_findings(record.path, lookup)
        elif record.format not in _MADE_AGAIN:
            rows.append(finding('EOPNOTSUPP', f'{record.path} was deleted, and no file of its type can be made again',
                                'checkpoint the tree when it has closed the file'))
        return rows

    def needs(self, record: PathReference, saved: SavedFile) -> Needs | None:
        return deleted_takes(record.path, record.device, record.inode, record.content) if record.content else None

    def create(self, record: PathReference, saved: SavedFile, ctx: RestoreContext) -> int:
        flags = opening(saved.flags) | os.O_PATH
        if record.link:
            fd = ctx.open_linked(record.link, record.path, flags)
        elif record.deleted:
            fd = self._make(record, flags, ctx)
        else:
            fd = ctx.open(record.path, flags)
        if stat.S_IFMT(os.fstat(fd).st_mode) != record.format:
            os.close(fd)
            raise CkptError(f'{record.path} is a file of another type now', resource=record.path)
        return fd

    def _make(self, record: PathReference, flags: int, ctx: RestoreContext) -> int:
        match record.format:
            case stat.S_IFLNK:
                return make_symlink(record.path, record.target, flags, ctx)
            case stat.S_IFDIR:
                return open_again(removed_directory(record.path, record.mode, ctx), flags)
            case stat.S_IFREG:
                return open_again(deleted_file(record.path, record.device, record.inode, record.size, record.mode,
                                               record.content, ctx), flags)
            case _:
                return make_device(record.path, record.mode, record.device_number, flags, ctx)


def _target(file: OpenFile) -> str:
    """Read the target of a symbolic link; '' for another file."""
    if not stat.S_ISLNK(file.stat.st_mode):
        return ''
    with file.duplicate() as fd:
        return os.readlink('', dir_fd=fd)
