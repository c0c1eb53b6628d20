# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that say something else than was dumped: what no test can bring about on the machine it runs on."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from ckptd.image.grammar import Record, encode_end, encode_header, encode_record, read_records
from ckptd.image.manifest import NAME, Part, encode_manifest, read_manifest
from ckptd.image.records import PARTS

R = TypeVar('R', bound=Record)


def rewrite(image: Path, cls: type[R], change: Callable[[R], R]) -> None:
    """Change every record of a class; digests and manifest fit afterwards."""
    code = list(PARTS)[cls.tag >> 8]
    path = image / PARTS[code]
    with path.open('rb') as file:
        found = [change(one) if isinstance(one, cls) else one for one in read_records(file, code.encode(), path.name)]
    data = encode_header(code.encode()) + b''.join(map(encode_record, found)) + encode_end(len(found))
    path.write_bytes(data)
    manifest = read_manifest(image)
    parts = {**manifest.parts, path.name: Part(size=len(data), sha256=hashlib.sha256(data).hexdigest())}
    (image / NAME).write_bytes(encode_manifest(msgspec.structs.replace(manifest, parts=parts)))


def alter(image: Path, cls: type[Record], **fields: object) -> None:
    """The same with new values of some fields."""
    rewrite(image, cls, lambda one: dataclasses.replace(one, **fields))  # type: ignore[type-var]
