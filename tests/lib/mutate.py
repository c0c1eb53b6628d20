# SPDX-License-Identifier: LGPL-2.1-or-later
"""Crafted images: records of an image changed to extremes. All sizes, checksums and digests fit, so nothing but what
the records mean is wrong.

    image = Mutable.read(directory)
    for change in image.changes():                      # each record class and kind, each field, each extreme
        with image.files([change]) as files: ...
    edits = image.edits(random.Random(seed))            # several at once
    image.write(directory, edits)
"""

import dataclasses
import hashlib
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args, get_origin, get_type_hints

import msgspec

from ckptd.image.grammar import Record, Struct, encode_end, encode_header, encode_record
from ckptd.image.manifest import NAME, Manifest, Part, encode_manifest, read_manifest
from ckptd.image.records import PARTS, SavedFile, SharedMemory, TaskRecord, Vma
from ckptd.image.source import GivenFiles
from tests.lib.altered import read_part, write_file
from tests.lib.imgedit import KINDS

# bits of the codes of the grammar's integers
_WIDTHS = {'B': 8, 'H': 16, 'I': 32, 'Q': 64}
_NUMBERS = (0, 1, 2, 1 << 7, (1 << 8) - 1, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
            1 << 47, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
_TEXTS = ('', '/', 'x', '..', '/../..', 'a\0b', '/a\0b', '\udcff', '/' + 'x' * 300, '/' + 'x' * 5000, '9' * 30,
          '/proc/self/mem')
_BYTES = (b'', b'\0', b'\xff' * 7, b'\xff' * 128, b'\0' * 4096)
_SEVERAL = (1, 1, 1, 1, 2, 3, 5, 8)     # edits of a random image
_KNOWN_VALUES = 6                       # values that a field has elsewhere in the image, a few of each

# the values that a field has in an image, by (class, field)
Known = Mapping[tuple[type, str], Sequence[Any]]


class Change(NamedTuple):
    """Record `index` of the part of that code becomes `records`; bytes are a record as it is encoded."""
    code: str
    index: int
    records: tuple[Record | bytes, ...]
    what: str

    def __str__(self) -> str:
        return self.what


class Claim(NamedTuple):
    """Fields of the manifest."""
    fields: Mapping[str, Any]
    what: str

    def __str__(self) -> str:
        return self.what


class Cut(NamedTuple):
    """A data part has so many bytes only, and the manifest says the same."""
    name: str
    size: int

    def __str__(self) -> str:
        return f'{self.name} has {self.size} bytes'


Edit = Change | Claim | Cut


class Mutable:
    """The records of an image in memory; its files stay open, until `close`, for a process that cannot open them."""

    def __init__(self, directory: Path, parts: Mapping[str, Sequence[Record]]) -> None:
        self._directory, self._parts = directory, parts
        self.manifest = read_manifest(directory)
        self._known = _known(parts)
        self._encoded = {code: [encode_record(one) for one in records] for code, records in parts.items()}
        self._places = self._find_places()
        self._fds = {name: os.open(directory / name, os.O_RDONLY) for name in (NAME, *self.manifest.parts)}

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    @classmethod
    def read(cls, directory: Path) -> Self:
        return cls(directory, {code: read_part(directory, code) for code in PARTS})

    @property
    def names(self) -> set[str]:
        """What records there are: 'TaskRecord', 'SavedFile of kind pipe'."""
        return {name for _, name in self._places}

    @property
    def records(self) -> int:
        """How many there are."""
        return sum(map(len, self._parts.values()))

    def part(self, code: str) -> Sequence[Record]:
        return self._parts[code]

    @property
    def vpids(self) -> set[int]:
        """Of all tasks."""
        return {one.vpid for one in self._parts['TREE'] if isinstance(one, TaskRecord)}

    # ------------------------------------------------------------ what to change

    def changes(self) -> Iterator[Change]:
        """Every change of the first and the last record of each class and kind."""
        for (code, name), indices in self._places.items():
            for index in sorted({indices[0], indices[-1]}):
                yield from self._of_record(code, index, name)

    def edits(self, dice: random.Random) -> list[Edit]:
        """Random changes of different records; now and then of the manifest and of data parts."""
        if dice.random() < 0.03:
            return [self._claim(dice)]
        found: dict[object, Edit] = {}
        for _ in range(dice.choice(_SEVERAL)):
            if dice.random() < 0.01:
                cut = self._cut(dice)
                found[cut.name] = cut
            else:
                change = self._change(dice)
                found[change.code, change.index] = change
        return list(found.values())

    def _find_places(self) -> dict[tuple[str, str], list[int]]:
        """Indices of the records of a class and kind, by part and name."""
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for code, records in self._parts.items():
            for index, one in enumerate(records):
                kind = f' of kind {one.kind}' if isinstance(one, SavedFile | Vma | SharedMemory) else ''
                found[code, type(one).__name__ + kind].append(index)
        return found

    def _of_record(self, code: str, index: int, name: str) -> Iterator[Change]:
        one, where = self._parts[code][index], f'{name}, record {index} of {PARTS[code]}'
        yield Change(code, index, (), f'{where} is missing')
        yield Change(code, index, (one, one), f'{where} is there twice')
        for path, changed in variants(one, self._known):
            yield Change(code, index, (changed,), f'{where}: {path}')
        if isinstance(one, SavedFile):
            inner = KINDS[one.kind].decode(one.data)
            for path, changed in variants(inner, self._known):
                data = dataclasses.replace(one, data=changed.encode())
                yield Change(code, index, (data,), f'{where}: {type(inner).__name__}.{path}')

    def _change(self, dice: random.Random) -> Change:
        code, name = dice.choice(list(self._places))
        index = dice.choice(self._places[code, name])
        one, where = self._parts[code][index], f'{name}, record {index} of {PARTS[code]}'
        match dice.randrange(40):
            case 0:
                return Change(code, index, (), f'{where} is missing')
            case 1:
                return Change(code, index, (one, one), f'{where} is there twice')
            case 2:
                other = dice.choice(self._parts[dice.choice(list(self._parts))])
                return Change(code, index, (other,), f'{where} is a {type(other).__name__}')
            case 3:
                other = dice.choice(self._parts[code])
                return Change(code, index, (other, one), f'{where} follows another {type(other).__name__}')
            case 4 | 5:
                return Change(code, index, (_garbled(one, dice),), f'{where} has other bytes')
        if isinstance(one, SavedFile) and dice.random() < 0.6:
            inner = KINDS[one.kind].decode(one.data)
            path, changed = variant(inner, self._known, dice)
            return Change(code, index, (dataclasses.replace(one, data=changed.encode()),),
                          f'{where}: {type(inner).__name__}.{path}')
        path, changed = variant(one, self._known, dice)
        return Change(code, index, (changed,), f'{where}: {path}')

    def _claim(self, dice: random.Random) -> Claim:
        """Any field of the manifest but the digests."""
        name = dice.choice([name for name in Manifest.__struct_fields__ if name not in ('format', 'parts')])
        value, path = getattr(self.manifest, name), name
        if isinstance(value, msgspec.Struct):
            inner = dice.choice(value.__struct_fields__)
            number = dice.choice((*_NUMBERS, -1, -(1 << 62), -(1 << 63), getattr(value, inner) + 1))
            value, path = msgspec.structs.replace(value, **{inner: number}), f'{name}.{inner} = {number:#x}'
        else:
            value = dice.choice(_NUMBERS if isinstance(value, int) else _TEXTS if isinstance(value, str) else [(), 1])
            path = f'{name} = {str(value)[:30]!r}'
        return Claim({name: value}, f'{NAME}: {path}')

    def _cut(self, dice: random.Random) -> Cut:
        name = dice.choice(sorted({*self.manifest.parts} - {*PARTS.values()}))
        size = self.manifest.parts[name].size
        return Cut(name, dice.choice((0, 1, size // 2, max(0, size - 1), max(0, size - 4096))))

    # ------------------------------------------------------------ the image with changes

    def content(self, edits: Sequence[Edit], **fields: Any) -> dict[str, bytes]:
        """The files that differ, by name, the manifest among them. fields: of the manifest."""
        files: dict[str, bytes] = {}
        changes = [one for one in edits if isinstance(one, Change)]
        for code in {change.code for change in changes}:
            instead = {change.index: change.records for change in changes if change.code == code}
            rows = [row for index, old in enumerate(self._encoded[code])
                    for row in (map(_encoded, instead[index]) if index in instead else (old,))]
            files[PARTS[code]] = encode_header(code.encode()) + b''.join(rows) + encode_end(len(rows))
        for cut in edits:
            if isinstance(cut, Cut):
                files[cut.name] = os.pread(self._fds[cut.name], cut.size, 0)
        parts = self.manifest.parts | {name: Part(size=len(data), sha256=hashlib.sha256(data).hexdigest())
                                       for name, data in files.items()}
        claimed = {name: value for one in edits if isinstance(one, Claim) for name, value in one.fields.items()}
        manifest = msgspec.structs.replace(self.manifest, **{'parts': parts, **claimed, **fields})
        with suppress(UnicodeEncodeError, OverflowError):       # what JSON cannot say
            files[NAME] = encode_manifest(manifest)
        return files

    @contextmanager
    def files(self, edits: Sequence[Edit]) -> Iterator[GivenFiles]:
        """The image with these changes, of a record one at most; it is in memory."""
        found: dict[str, int] = {}
        try:
            for name, data in self.content(edits).items():
                found[name] = os.memfd_create(name)
                os.write(found[name], data)
            for name in self._fds.keys() - found.keys():
                found[name] = os.dup(self._fds[name])
            given = GivenFiles(found)
        except BaseException:
            for fd in found.values():
                os.close(fd)
            raise
        try:
            yield given
        finally:
            given.close()

    def write(self, to: Path, edits: Sequence[Edit] = ()) -> Path:
        """The same as a directory. Files that have not changed are links: they take no time and no room."""
        to.mkdir(mode=0o700)
        for name in self._fds:
            os.link(self._directory / name, to / name)
        for name, data in self.content(edits, image=to.name).items():
            write_file(to / name, data)
        return to


def _encoded(one: Record | bytes) -> bytes:
    return one if isinstance(one, bytes) else encode_record(one)


def _garbled(one: Record, dice: random.Random) -> bytes:
    """A record with other bytes in it, or another length; its checksum is right."""
    payload = one.encode()
    match dice.randrange(4):
        case 0:
            payload = payload[:dice.randrange(len(payload) + 1)]
        case 1:
            payload += dice.randbytes(dice.choice((1, 4, 100)))
        case _:
            payload = _flipped(payload, dice)
    return _Raw(type(one), payload).encoded()


class _Raw:
    """A payload under the tag of a record."""

    def __init__(self, cls: type[Record], payload: bytes) -> None:
        self.tag, self.version, self.optional = cls.tag, cls.version, cls.optional
        self._payload = payload

    def encode(self) -> bytes:
        return self._payload

    def encoded(self) -> bytes:
        return encode_record(self)  # type: ignore[arg-type]


# ---------------------------------------------------------------- values

@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@cache
def _fields(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]


def variants(one: Struct, known: Known) -> Iterator[tuple[str, Any]]:
    """(field and value, the same with that value) for each field and each extreme."""
    for name in _fields(type(one)):
        value = getattr(one, name)
        for what, other in _values(_hints(type(one))[name], value, known.get((type(one), name), ()), known, None):
            if other != value:
                yield f'{name}{what}', dataclasses.replace(one, **{name: other})  # type: ignore[type-var]


def variant(one: Struct, known: Known, dice: random.Random) -> tuple[str, Any]:
    """One of them, of a field by chance, or with a value by chance."""
    name = dice.choice(_fields(type(one)))
    alike = known.get((type(one), name), ())
    what, other = dice.choice(list(_values(_hints(type(one))[name], getattr(one, name), alike, known, dice)))
    return f'{name}{what}', dataclasses.replace(one, **{name: other})  # type: ignore[type-var]


def _values(hint: Any, value: Any, alike: Sequence[Any], known: Known, dice: random.Random | None
            ) -> Iterator[tuple[str, Any]]:
    """alike: what the same field has elsewhere."""
    if hasattr(hint, '__metadata__'):
        width = _WIDTHS[get_args(hint)[1]]
        numbers = {*_NUMBERS, *alike, value + 1, max(0, value - 1), value ^ 1 << width - 1}
        numbers |= {dice.randrange(1 << width), value ^ 1 << dice.randrange(width)} if dice else set()
        yield from ((f' = {number:#x}', number) for number in sorted(numbers) if number < 1 << width)
    elif hint is str:
        yield from ((f' = {text[:12]!r}', text) for text in (*_TEXTS, *alike, value + 'x', value[:-1]))
    elif hint is bytes:
        whole = (value + b'\0', value[:-1], value[len(value) // 2:], bytes(byte ^ 0xFF for byte in value))
        chance = (_flipped(value, dice),) if dice and value else ()
        yield from ((f' of {len(data)} bytes', data) for data in (*_BYTES, *whole, *chance))
    elif get_origin(hint) is tuple:
        yield from _lists(get_args(hint)[0], value, alike, known, dice)
    elif dice:
        what, other = variant(value, known, dice)
        yield f'.{what}', other
    else:
        yield from ((f'.{what}', other) for what, other in variants(value, known))


def _flipped(value: bytes, dice: random.Random) -> bytes:
    changed = bytearray(value)
    for _ in range(dice.choice((1, 1, 4, 16)) if value else 0):
        changed[dice.randrange(len(changed))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    return bytes(changed)


def _lists(hint: Any, value: tuple[Any, ...], alike: Sequence[Any], known: Known, dice: random.Random | None
           ) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield ' = ()', ()
    if not value:
        yield from ((' = an item of another', (one,)) for one in alike)
        return
    yield ' without the last', value[:-1]
    yield ' without the first', value[1:]
    yield ' with the first twice', (value[0], *value)
    yield ' doubled', (*value, *value)
    yield ' reversed', value[::-1]
    for index in sorted({0, len(value) - 1}) if dice is None else [dice.randrange(len(value))]:
        for what, other in _values(hint, value[index], alike, known, dice):
            yield f'[{index}]{what}', (*value[:index], other, *value[index + 1:])


def _known(parts: Mapping[str, Sequence[Record]]) -> Known:
    found: dict[tuple[type, str], dict[Any, None]] = defaultdict(dict)
    todo: list[Struct] = [one for records in parts.values() for one in records]
    while todo:
        one = todo.pop()
        if isinstance(one, SavedFile):
            todo.append(KINDS[one.kind].decode(one.data))
        for name in _fields(type(one)):
            value = getattr(one, name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Struct):
                    todo.append(item)
                else:
                    found[type(one), name][item] = None
    return {key: tuple(values)[:_KNOWN_VALUES] for key, values in found.items()}
