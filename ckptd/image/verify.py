# SPDX-License-Identifier: LGPL-2.1-or-later
"""verify: find every damage of an image: files, digests, grammar, and references between records."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from ckptd.errors import ImageDamaged
from ckptd.image.files import digest_file
from ckptd.image.grammar import Record, read_records
from ckptd.image.manifest import NAME, Manifest, Part, read_manifest_of
from ckptd.image.records import PARTS
from ckptd.image.references import MAX_DAMAGES, RecordChecker
from ckptd.image.source import ImageFiles, files_of, open_part

Records: TypeAlias = dict[str, list[Record]]        # the records of each part: 'TREE', 'TASK', ...


def verify(image: Path | ImageFiles, on_bytes: Callable[[int], None] | None = None,
           records: Records | None = None) -> list[str]:
    """List the damages of an image, one sentence each, at most `MAX_DAMAGES`. Empty for an intact image.

    on_bytes(n) is called for progress after every n bytes that were hashed, and with 0 after every record. An error
    that it raises ends this. records: collects the records, for an ImageReader, so that they are decoded once.
    """
    return [*verify_records(image, on_bytes, records), *verify_data(image, on_bytes)][:MAX_DAMAGES]


def verify_records(image: Path | ImageFiles, on_bytes: Callable[[int], None] | None = None,
                   records: Records | None = None) -> list[str]:
    """List all damages except wrong digests of the data parts: everything that a plan needs to know. At most
    `MAX_DAMAGES`. on_bytes, records: as for `verify`."""
    damages: list[str] = []
    try:
        with files_of(image) as files:
            _verify_all(files, damages, on_bytes, records)
    except ImageDamaged as error:
        return [error.message]
    return damages[:MAX_DAMAGES]


def _verify_all(files: ImageFiles, damages: list[str], on_bytes: Callable[[int], None] | None,
                records: Records | None) -> None:
    manifest = _read_manifest(files, damages)
    found = files.names()
    _verify_names(found, manifest, damages)
    # without a manifest, any existing data part may belong to the image
    names = manifest.parts if manifest else {name for name in found if name.startswith('data-')}
    sizes = {name: _verify_file(files, name, manifest, damages, on_bytes)
             for name in sorted({*names, *PARTS.values()})}
    checker = RecordChecker({name: size for name, size in sizes.items() if size is not None}, damages)
    whole = [_verify_records(files, code, checker, damages, on_bytes,
                             None if records is None else records.setdefault(code, [])) for code, name in PARTS.items()
             if sizes.get(name) is not None]
    # a part that broke off lacks records that others refer to; these are not further damages
    if len(whole) == len(PARTS) and all(whole):
        checker.finish(manifest)


def verify_data(image: Path | ImageFiles, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """Check the digests of the data parts that have the right size. This takes nearly all the time of `verify`. Damages
    that `verify_records` reports are not repeated. It can run in a thread, since digests are computed without the
    interpreter's lock.

    on_bytes(n) is called after every n bytes, for progress. An error that it raises ends this.
    """
    damages: list[str] = []
    try:
        with files_of(image) as files:
            manifest = read_manifest_of(files)
            for name in sorted({*manifest.parts} - {*PARTS.values()}):
                _verify_digest(files, name, manifest.parts[name], damages, on_bytes)
    except ImageDamaged:
        return damages
    return damages[:MAX_DAMAGES]


def _read_manifest(files: ImageFiles, damages: list[str]) -> Manifest | None:
    try:
        return read_manifest_of(files)
    except ImageDamaged as error:
        damages.append(error.message)
        return None


def _verify_names(found: Iterable[str], manifest: Manifest | None, damages: list[str]) -> None:
    if manifest is not None:
        expected = {NAME, *manifest.parts}
        damages += [f'{name} does not belong to the image' for name in sorted(set(found) - expected)]
        damages += [f'{NAME}: part {name} is not listed' for name in PARTS.values() if name not in expected]


def _verify_file(files: ImageFiles, name: str, manifest: Manifest | None, damages: list[str],
                 on_bytes: Callable[[int], None] | None) -> int | None:
    """Check a file and return its size; None if it does not exist."""
    part = manifest.parts.get(name) if manifest else None
    try:
        fd = files.open(name)
    except ImageDamaged as error:
        damages.append(error.message)
        return None
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if part is not None and size != part.size:
        damages.append(f'{name} has {size} bytes, not {part.size}')
    elif part is not None and name in PARTS.values():
        _verify_digest(files, name, part, damages, on_bytes)
    return size


def _verify_digest(files: ImageFiles, name: str, part: Part, damages: list[str],
                   on_bytes: Callable[[int], None] | None) -> None:
    try:
        fd = files.open(name)
    except ImageDamaged:
        return          # reported already
    try:
        if os.fstat(fd).st_size == part.size and digest_file(fd, on_bytes)[1] != part.sha256:
            damages.append(f'{name}: its digest does not match its content')
    except OSError as error:
        damages.append(f'{name} cannot be read: {error.strerror}')
    finally:
        os.close(fd)


def _verify_records(files: ImageFiles, code: str, checker: RecordChecker, damages: list[str],
                    on_bytes: Callable[[int], None] | None, kept: list[Record] | None) -> bool:
    name = PARTS[code]
    try:
        with open_part(files, name) as file:
            for one in read_records(file, code.encode(), name):
                if list(PARTS)[one.tag >> 8:][:1] != [code]:
                    damages.append(f'{name}: a {type(one).__name__} record does not belong there')
                checker.add(one)
                if kept is not None:
                    kept.append(one)
                if on_bytes:
                    on_bytes(0)
        return True
    except ImageDamaged as error:
        damages.append(error.message)
    except OSError as error:
        damages.append(f'{name} cannot be read: {error.strerror}')
    return False
