# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files that their paths do not lead to, so that a restart would open others."""

from ckptd.errors import Finding
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.objects.files.base import OpenFile, finding


def hidden_findings(file: OpenFile, what: str = 'file') -> list[Finding]:
    """Warn about a file that another one hides or has replaced. Refuse a file whose mount has no place in the tree of
    directories: its path begins at its own mount, and names another file or none."""
    if file.deleted or file.reachable:
        return []
    if not any(mount.id == file.info.mnt_id for mount in (*read_mountinfo(file.tid), *read_mountinfo())):
        return [finding('EOPNOTSUPP', f'{file.path} is a {what} of a mount that is not attached (fsmount, open_tree, '
                        'umount -l)', 'close it before the checkpoint, or attach the mount (move_mount)')]
    return [finding('ENOENT', f'{file.path} is another {what} now, or hidden by a mount',
                    f'a restart opens it by its path: remove the mount, or put the {what} back', 'warning')]
