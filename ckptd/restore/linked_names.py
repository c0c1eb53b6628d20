# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names outside of an image that its checkpoint gave to deleted files: taken away with the image or at its restart."""

import logging
from contextlib import nullcontext

from ckptd.image.reader import ImageReader
from ckptd.image.records import Backing, SavedFile
from ckptd.objects.files.base import ByUser
from ckptd.objects.files.linked import take_away
from ckptd.objects.files.registry import Kinds
from ckptd.objects.verify import decode

log = logging.getLogger(__name__)


def linked_names(reader: ImageReader) -> dict[str, int]:
    """The inode that each name is of. ImageDamaged."""
    found: dict[str, int] = {}
    kinds = Kinds()
    for saved in reader.every(SavedFile):
        _, record = decode(saved, kinds)
        if link := str(getattr(record, 'link', '')):
            found[link] = int(getattr(record, 'inode', 0))
    return found | {record.link: record.inode for record in reader.every(Backing) if record.link}


def take_names_away(reader: ImageReader, user: ByUser | None = None) -> None:
    """Unlink all names by the rights of `user`, or ours. One that cannot be unlinked stays, and the log says so: the
    tree has its file by then, or nobody can have it any more."""
    for path, inode in linked_names(reader).items():
        try:
            with user.as_user() if user else nullcontext():
                take_away(path, inode)
        except OSError as error:
            log.warning('%s stays: %s', path, error.strerror)
