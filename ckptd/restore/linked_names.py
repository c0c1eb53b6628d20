# SPDX-License-Identifier: LGPL-2.1-or-later
"""Remove what a checkpoint made outside of its image: the names of deleted files, at the restart or the removal of the
image, and what kinds of open files have left there."""

import logging
from contextlib import nullcontext, suppress

from ckptd.errors import ImageDamaged
from ckptd.image.reader import ImageReader
from ckptd.image.records import Backing, SavedFile
from ckptd.objects.files.base import ByUser
from ckptd.objects.files.linked import take_away
from ckptd.objects.files.other_names import is_name
from ckptd.objects.files.registry import Kinds
from ckptd.objects.verify import decode

log = logging.getLogger(__name__)


def linked_names(reader: ImageReader) -> dict[str, int]:
    """Return the names that the checkpoint gave, each with the inode of its file. ImageDamaged."""
    found: dict[str, int] = {}
    kinds = Kinds()
    for saved in reader.every(SavedFile):
        _, record = decode(saved, kinds)
        if link := str(getattr(record, 'link', '')):
            found[link] = int(getattr(record, 'inode', 0))
    found |= {record.link: record.inode for record in reader.every(Backing)}
    return {link: inode for link, inode in found.items() if is_name(link)}


def take_names_away(reader: ImageReader, user: ByUser | None = None) -> None:
    """Unlink all names with the rights of `user`, or ours.

    A name that cannot be unlinked stays, with a warning in the log: the tree already has the file, or the image is
    being removed.
    """
    for path, inode in linked_names(reader).items():
        try:
            with user.as_user() if user else nullcontext():
                take_away(path, inode)
        except OSError as error:
            log.warning('%s stays: %s', path, error.strerror)


def forget_files(reader: ImageReader) -> None:
    """Remove what the kinds of open files have left outside of the image. Damaged records leave it there."""
    kinds = Kinds()
    for saved in reader.every(SavedFile):
        with suppress(ImageDamaged):
            kind, record = decode(saved, kinds)
            kind.forget(record)
