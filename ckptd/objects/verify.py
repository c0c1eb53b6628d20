# SPDX-License-Identifier: LGPL-2.1-or-later
"""verify: find damages in the records of open files. Only the kind of a file can read the payload of its record."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ckptd.errors import ImageDamaged
from ckptd.image.grammar import Struct
from ckptd.image.reader import ImageReader
from ckptd.image.records import SavedFile
from ckptd.objects.files.base import Kind
from ckptd.objects.files.registry import Kinds
from ckptd.objects.files.sound import flaws


def file_ids(reader: ImageReader) -> frozenset[int]:
    """Return the ids of the open files of an image."""
    return frozenset(saved.file_id for saved in reader.every(SavedFile))


def decode(saved: SavedFile, kinds: Kinds) -> tuple[Kind[Any], Struct]:
    """Return the kind that wrote the record of an open file, and its data. ImageDamaged."""
    kind = kinds.by_tag.get(saved.kind)
    if kind is None:
        raise ImageDamaged(f'{saved.link}: a file of the unknown kind {saved.kind!r}',
                           resource=saved.link, hint='use the ckptd that wrote the image, or a newer one')
    return kind, kind.record.decode(saved.data)


def sessions(reader: ImageReader, kinds: Kinds) -> set[int]:
    """Return the vpids of session leaders that get a controlling terminal of the tree. Damaged records, which other
    checks report, give none."""
    found: set[int] = set()
    for saved in reader.every(SavedFile):
        with suppress(ImageDamaged):
            kind, record = decode(saved, kinds)
            found.update(kind.sessions(record))
    return found - {0}


def payload_flaws(kind: Kind[Any], record: Struct, reader: ImageReader, known: frozenset[int]) -> Iterator[str]:
    """Yield the violations, one sentence each. known: the ids of all open files of the image."""
    yield from flaws(record, reader.size_of)
    for file_id in sorted({*kind.references(record)} - known):
        yield f'it refers to open file {file_id}, which is not in the image'


def file_damages(reader: ImageReader) -> Iterator[str]:
    """Yield the damages of the open files of an image, one sentence each."""
    kinds, known = Kinds(), file_ids(reader)
    for saved in reader.every(SavedFile):
        try:
            kind, record = decode(saved, kinds)
        except ImageDamaged as error:
            yield error.message
            continue
        for flaw in payload_flaws(kind, record, reader, known):
            yield f'{saved.link}: {flaw}'
