# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that say something else than was dumped: what no test can bring about on the machine it runs on."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from ckptd.image.grammar import Record, read_records
from ckptd.image.manifest import NAME, Part, encode_manifest, read_manifest
from ckptd.image.reader import part_code
from ckptd.image.records import PARTS
from tests.lib.imgedit import encode_part

R = TypeVar('R', bound=Record)


def read_part(image: Path, code: str) -> list[Record]:
    """The records of a part."""
    with (image / PARTS[code]).open('rb') as file:
        return list(read_records(file, code.encode(), PARTS[code]))


def write_part(image: Path, code: str, records: Iterable[Record], **fields: object) -> None:
    """Give a part other records, and the manifest other fields; digests and manifest fit afterwards."""
    data, name = encode_part(code, list(records)), PARTS[code]
    write_file(image / name, data)
    manifest = read_manifest(image)
    parts = {**manifest.parts, name: Part(size=len(data), sha256=hashlib.sha256(data).hexdigest())}
    write_file(image / NAME, encode_manifest(msgspec.structs.replace(manifest, parts=parts, **fields)))


def write_file(path: Path, data: bytes) -> None:
    """A new file in the place of one that a copy of the image may share."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def copy(image: Path, to: Path) -> Path:
    """Another image with the same content. The files are links: only what is written of it takes time and room."""
    to.mkdir(mode=0o700)
    for path in image.iterdir():
        os.link(path, to / path.name)
    manifest = msgspec.structs.replace(read_manifest(image), image=to.name)
    write_file(to / NAME, encode_manifest(manifest))
    return to


def rewrite(image: Path, cls: type[R], change: Callable[[R], R]) -> None:
    """Change every record of a class; digests and manifest fit afterwards."""
    code = part_code(cls)
    write_part(image, code, [change(one) if isinstance(one, cls) else one for one in read_part(image, code)])


def alter(image: Path, cls: type[Record], **fields: object) -> None:
    """The same with new values of some fields."""
    rewrite(image, cls, lambda one: dataclasses.replace(one, **fields))  # type: ignore[type-var]
