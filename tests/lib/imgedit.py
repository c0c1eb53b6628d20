# SPDX-License-Identifier: LGPL-2.1-or-later
"""Edit an image as whoever holds its stream can: every record by name, and all digests right afterwards.

    image = ImageStream.load(stream)                    # the tar of Image.Export or Image.Open
    image.alter('Credentials', groups=())               # fields of every record of that name
    image.change('Vma', lambda vma: None if vma.locked else vma)
    image.alter_kind('fifo', uid=0, gid=0)              # the payload of open files of a kind
    image.claim(boot_id='another')                      # fields of the manifest
    stream = image.dump()                               # for ImportImage

A change takes a record and returns the record that replaces it, or None to leave it out.

A record class is found by its name in ckptd.image.records, so a program may walk NAMES and FIELDS.
"""

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, Self

import msgspec

from ckptd.image.grammar import RECORDS, Record, Struct, decode_records, encode_end, encode_header, encode_record
from ckptd.image.manifest import NAME as MANIFEST
from ckptd.image.manifest import Manifest, Part, decode_manifest, encode_manifest
from ckptd.image.reader import part_code
from ckptd.image.records import PAGE, PARTS, Extent, SavedFile, data_name
from ckptd.objects.files.registry import BY_TAG

Change = Callable[[Any], Any]
Where = Callable[[Any], bool]

# every record that an image may have, by the name of its class
NAMES: dict[str, type[Record]] = {cls.__name__: cls for cls in RECORDS.values()}
# the record of each kind of open file, which is encoded in OpenFile.data, by the kind's tag
KINDS: dict[str, type[Struct]] = {tag: kind.record for tag, kind in BY_TAG.items()}
# names of the fields of each, in the order of the format
FIELDS: dict[str,
             tuple[str, ...]] = {name: tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
                                      for name, cls in (NAMES | KINDS).items()}


@dataclasses.dataclass
class ImageStream:
    """An image in memory. records: those of each part in their order, by the part's code. data: the bytes of data
    parts, by file name."""
    manifest: Manifest
    records: dict[str, list[Record]]
    data: dict[str, bytes]

    # ------------------------------------------------------------ to and from bytes

    @classmethod
    def load(cls, stream: bytes) -> Self:
        """Take a tar apart."""
        files: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
            for member in tar:
                if (file := tar.extractfile(member)) is not None:
                    files[member.name.rpartition('/')[2]] = file.read()
        manifest = decode_manifest(files.pop(MANIFEST))
        records = {code: list(decode_records(files.pop(name), code.encode(), name)) for code, name in PARTS.items()}
        return cls(manifest, records, files)

    def parts(self) -> dict[str, bytes]:
        """The bytes of every file of the image but its manifest, by name."""
        return {name: encode_part(code, self.records[code]) for code, name in PARTS.items()} | self.data

    def dump(self) -> bytes:
        """Put the tar together, with sizes, checksums and digests of what is in it now."""
        parts = self.parts()
        manifest = msgspec.structs.replace(self.manifest, parts={
            name: Part(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in parts.items()})
        return pack(manifest.image, {MANIFEST: encode_manifest(manifest), **parts})

    # ------------------------------------------------------------ records

    def every(self, name: str) -> list[Any]:
        """The records of a class, in their order."""
        cls = NAMES[name]
        return [record for record in self.records[part_code(cls)] if type(record) is cls]

    def one(self, name: str) -> Any:
        """The only record of a class."""
        [record] = self.every(name)
        return record

    def change(self, name: str, change: Change) -> int:
        """Replace each record of a class by what `change` makes of it. How many have become another, or are gone."""
        cls, count, kept = NAMES[name], 0, []
        code = part_code(cls)
        for record in self.records[code]:
            new = change(record) if type(record) is cls else record
            count += new != record
            kept += [] if new is None else [new]
        self.records[code] = kept
        return count

    def alter(self, name: str, where: Where = lambda record: True, **fields: Any) -> int:
        """Give fields of those records of a class that fit other values. How many have changed."""
        return self.change(name, lambda record: dataclasses.replace(record, **fields) if where(record) else record)

    def add(self, *records: Record) -> None:
        """Put records at the end of their parts."""
        for record in records:
            self.records[part_code(type(record))].append(record)

    def sort(self, name: str, key: Callable[[Any], Any]) -> None:
        """Bring the records of a class into order; those of other classes stay where they are."""
        cls, code = NAMES[name], part_code(NAMES[name])
        ordered = iter(sorted(self.every(name), key=key))
        self.records[code] = [next(ordered) if type(record) is cls else record for record in self.records[code]]

    # ------------------------------------------------------------ open files, by kind

    def files(self, tag: str) -> Iterator[tuple[SavedFile, Any]]:
        """Open files of a kind, each with its payload."""
        for record in self.every('SavedFile'):
            if record.kind == tag:
                yield record, KINDS[tag].decode(record.data)

    def change_kind(self, tag: str, change: Change, where: Where = lambda file: True) -> int:
        """As `change`, of the payloads of a kind. where: which open files."""
        def replace(file: Any) -> Any:
            if file.kind != tag or not where(file):
                return file
            return dataclasses.replace(file, data=change(KINDS[tag].decode(file.data)).encode())
        return self.change('SavedFile', replace)

    def alter_kind(self, tag: str, where: Where = lambda file: True, **fields: Any) -> int:
        """As `alter`, of the payloads of a kind."""
        return self.change_kind(tag, lambda payload: dataclasses.replace(payload, **fields), where)

    # ------------------------------------------------------------ the rest

    def claim(self, **fields: Any) -> None:
        """Give fields of the manifest other values."""
        self.manifest = msgspec.structs.replace(self.manifest, **fields)

    def add_data(self, data: bytes) -> Extent:
        """Bytes in a data part of their own; where they are."""
        number = next(number for number in range(len(self.data) + 1) if data_name(number) not in self.data)
        self.data[data_name(number)] = data.ljust(-(-len(data) // PAGE) * PAGE, b'\0')
        return Extent(number, 0, len(data))


def encode_part(code: str, records: list[Record]) -> bytes:
    """The file of a part."""
    return encode_header(code.encode()) + b''.join(map(encode_record, records)) + encode_end(len(records))


def pack(directory: str, files: dict[str, bytes]) -> bytes:
    """A tar of files in one directory, in their order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f'{directory}/{name}')
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()
