# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image as a tar stream: real tar agrees, and no stream of anybody leaves more than an error."""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptd.errors import Cancelled, CkptError, ImageDamaged, LimitsExceeded, SpoolFailed
from ckptd.image import records as r
from ckptd.image.archive.pack import part_order, write_archive
from ckptd.image.archive.unpack import MAX_PADDING, MAX_PAX, destination_in, parse_pax, read_archive
from ckptd.image.grammar import encode_end, encode_header, encode_record
from ckptd.image.ids import is_image_id
from ckptd.image.manifest import MAX_MANIFEST, NAME, Manifest, Part, decode_manifest, encode_manifest, read_manifest
from ckptd.image.verify import verify
from ckptd.image.writer import INCOMING, ImageWriter, Incoming
from tests.unit.image.samples import IMAGE, PAGE, manifest, small_image

BLOCK = 512
UID, GID = 1234, 4321
END = bytes(2 * BLOCK)
OTHER = '20240131_235959_other_0001'


class Onlooker:
    """Counts what it is told, and does something at one of the calls."""

    def __init__(self, act: Callable[[str], None] = lambda call: None) -> None:
        self.calls: list[str] = []
        self.reports: list[tuple[int, int]] = []
        self._act = act

    def _call(self, what: str) -> None:
        self.calls.append(what)
        self._act(what)

    def phase(self, name: str) -> None:
        self._call(name)

    def wait_readable(self, fd: int) -> None:
        self._call('wait')

    def progress(self, done: int, total: int) -> None:
        self.reports.append((done, total))
        self._call('progress')


def names(spool: Path) -> list[str]:
    return sorted(path.name for path in spool.iterdir())


def contents(image: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in image.iterdir() if path.name != NAME}


def receive(stream: bytes, spool: Path, limit: int = 1 << 30, watcher: Onlooker | None = None) -> Manifest:
    fd = os.memfd_create('stream')
    try:
        os.write(fd, stream)
        os.lseek(fd, 0, os.SEEK_SET)
        return read_archive(fd, destination_in(spool), UID, GID, limit, watcher or Onlooker())
    finally:
        os.close(fd)


def stream_of(image: Path) -> bytes:
    fd = os.memfd_create('stream')
    try:
        write_archive(image, fd)
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


@pytest.fixture(scope='module')
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_image(tmp_path_factory.mktemp('origin'))


@pytest.fixture(scope='module')
def stream(image: Path) -> bytes:
    return stream_of(image)


# ---------------------------------------------------------------- what is written

def test_what_tar_says_of_it(image: Path, stream: bytes) -> None:
    command = ['tar', 'tvf', '-', '--numeric-owner', '--utc']
    done = subprocess.run(command, input=stream, capture_output=True, check=True)
    assert done.stderr == b''
    rows = [line.split() for line in done.stdout.decode().splitlines()]
    when = ['2023-11-14', '22:13']      # the manifest's created_usec
    assert rows[0] == ['drwx------', '0/0', '0', *when, f'{IMAGE}/']
    wanted = [NAME, 'tree.img', 'tasks.img', 'files.img', 'memory.img', 'data-0.img']
    assert rows[1:] == [['-rw-------', '0/0', str((image / name).stat().st_size), *when, f'{IMAGE}/{name}']
                        for name in wanted]


def test_tar_unpacks_it_into_a_sound_image(image: Path, stream: bytes, tmp_path: Path) -> None:
    subprocess.run(['tar', 'xf', '-', '--no-same-owner'], input=stream, cwd=tmp_path, check=True)
    assert verify(tmp_path / IMAGE) == []
    assert contents(tmp_path / IMAGE) == contents(image)
    assert (tmp_path / IMAGE / NAME).read_bytes() == (image / NAME).read_bytes()


def test_order_of_parts() -> None:
    found = ['data-10.img', 'tree.img', 'data-2.img', 'memory.img', 'data-0.img', 'files.img', 'tasks.img']
    assert part_order(found) == ['tree.img', 'tasks.img', 'files.img', 'memory.img', 'data-0.img', 'data-2.img',
                                 'data-10.img']


def through(image: Path, writer: int, reader: int) -> bytes:
    """The stream, read at the other end of a pipe or socket."""
    found = bytearray()

    def read() -> None:
        while data := os.read(reader, 1 << 16):
            found.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        write_archive(image, writer)
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)
    return bytes(found)


@pytest.fixture
def larger(spool: Path) -> Path:
    """An image that fills every pipe and socket."""
    with ImageWriter(Incoming(spool, IMAGE)) as writer:
        writer.data.add([bytes([number]) * PAGE for number in range(1, 256)] * 3)
        writer.publish(manifest())
    return spool / IMAGE


@pytest.mark.parametrize('blocking', [True, False])
@pytest.mark.parametrize('kind', ['pipe', 'socket'])
def test_sinks_that_cannot_seek(larger: Path, kind: str, blocking: bool) -> None:
    if kind == 'pipe':
        reader, writer = os.pipe()
    else:
        reader, writer = (one.detach() for one in socket.socketpair())
    os.set_blocking(writer, blocking)
    assert through(larger, writer, reader) == stream_of(larger)


def test_a_file_open_for_appending(larger: Path, tmp_path: Path) -> None:
    """sendfile(2) does not take it."""
    path = tmp_path / 'all.tar'
    path.write_bytes(b'before')
    with path.open('ab') as file:
        write_archive(larger, file.fileno())
    assert path.read_bytes() == b'before' + stream_of(larger)


def test_a_part_above_8_gib(image: Path, tmp_path: Path) -> None:
    """Its size is in a pax record. The reader goes away behind that."""
    copy = Path(shutil.copytree(image, tmp_path / IMAGE))
    size = (9 << 30) + PAGE
    os.truncate(copy / 'data-0.img', size)
    parts = {**read_manifest(copy).parts, 'data-0.img': Part(size=size, sha256='0' * 64)}
    (copy / NAME).write_bytes(encode_manifest(manifest(parts=parts)))
    reader, writer = os.pipe()
    sizes = {}

    def read() -> None:
        with os.fdopen(reader, 'rb') as pipe, tarfile.open(fileobj=pipe, mode='r|') as tar:
            while (member := tar.next()) is not None and not member.name.endswith('data-0.img'):
                continue
            sizes[member.name if member else ''] = member.size if member else 0

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with pytest.raises(CkptError, match='cannot write the tar stream: Broken pipe'):
            write_archive(copy, writer)
    finally:
        os.close(writer)
        thread.join()
    assert sizes == {f'{IMAGE}/data-0.img': size}


def test_a_full_disk_for_the_stream(larger: Path) -> None:
    with Path('/dev/full').open('wb') as full, pytest.raises(CkptError) as caught:
        write_archive(larger, full.fileno())
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.hint


@pytest.mark.parametrize('size', [0, 5, PAGE + 1])
def test_a_part_of_another_size_is_found_before_anything_is_written(image: Path, tmp_path: Path, size: int) -> None:
    copy = Path(shutil.copytree(image, tmp_path / IMAGE))
    os.truncate(copy / 'data-0.img', size)
    fd = os.memfd_create('stream')
    try:
        with pytest.raises(ImageDamaged, match=f'data-0.img has {size} bytes'):
            write_archive(copy, fd)
        assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)


# ---------------------------------------------------------------- a sound stream

def test_it_comes_back(image: Path, stream: bytes, spool: Path) -> None:
    watcher = Onlooker()
    got = receive(stream, spool, watcher=watcher)
    assert names(spool) == [IMAGE]
    assert verify(spool / IMAGE) == []
    assert contents(spool / IMAGE) == contents(image)
    there = read_manifest(image)
    assert got == read_manifest(spool / IMAGE)
    assert got == msgspec.structs.replace(there, owner_uid=UID, owner_gid=GID, imported=True)
    assert not there.imported
    assert (spool / IMAGE).stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (spool / IMAGE).iterdir()} == {0o600}
    assert [call for call in watcher.calls if call not in ('wait', 'progress')] == ['receive', 'verify', 'publish']
    assert watcher.reports[-1] == (got.size, got.size)
    assert watcher.reports.count((got.size, got.size)) >= 2       # received, and verified


def test_a_manifest_of_before_there_were_imports(image: Path) -> None:
    text = (image / NAME).read_bytes()
    assert b'"imported": false' in text
    older = text.replace(b'  "imported": false,\n', b'')
    body = older[:older.rindex(b',\n  "digest"')]
    seal = b',\n  "digest": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
    assert decode_manifest(body + seal) == read_manifest(image)


def test_of_a_pipe_in_small_pieces(image: Path, stream: bytes, spool: Path) -> None:
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, 'wb', buffering=0) as pipe:
            for at in range(0, len(stream), 777):
                pipe.write(stream[at:at + 777])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        read_archive(reader, destination_in(spool), UID, GID, 1 << 30, Onlooker())
    finally:
        thread.join()
        os.close(reader)
    assert contents(spool / IMAGE) == contents(image)


@pytest.mark.parametrize('options', [
    ['--format=gnu'], ['--format=ustar'], ['--format=posix'], ['--format=gnu', '--blocking-factor=1'],
    ['--format=posix', '--sort=name', '--blocking-factor=2000']], ids=' '.join)
@pytest.mark.parametrize('whole', [True, False])
def test_what_tar_makes_of_it(stream: bytes, spool: Path, tmp_path: Path, options: list[str], whole: bool) -> None:
    """Unpacked and packed again, the manifest first, with and without the directory."""
    subprocess.run(['tar', 'xf', '-'], input=stream, cwd=tmp_path, check=True)
    where, below = (tmp_path, f'{IMAGE}/') if whole else (tmp_path / IMAGE, '')
    files = [below + name for name in [NAME, *(name for name in reversed(names(tmp_path / IMAGE)) if name != NAME)]]
    again = subprocess.run(['tar', 'cf', '-', *options, *files], cwd=where, capture_output=True, check=True)
    assert again.stdout != stream
    receive(again.stdout, spool)
    assert verify(spool / IMAGE) == []


def test_an_id_that_is_taken(image: Path, stream: bytes, spool: Path) -> None:
    """By an image, by one that is just being written, and by what no image is."""
    first = receive(stream, spool)
    second = receive(stream, spool)
    assert first.image == IMAGE
    assert second.image != IMAGE
    assert second.image[:-4] == IMAGE[:-4]
    assert is_image_id(second.image)
    assert read_manifest(spool / second.image) == second
    assert verify(spool / second.image) == []
    assert contents(spool / second.image) == contents(image)
    shutil.rmtree(spool / IMAGE)
    with Incoming(spool, IMAGE):
        assert receive(stream, spool).image != IMAGE
    (spool / IMAGE).symlink_to('nowhere')
    assert receive(stream, spool).image != IMAGE
    assert len([name for name in names(spool) if name != IMAGE]) == 3


def test_an_id_that_may_be_taken(image: Path, stream: bytes, spool: Path) -> None:
    found = []
    for _ in range(2):
        fd = os.memfd_create('stream')
        os.write(fd, stream)
        os.lseek(fd, 0, os.SEEK_SET)
        found.append(read_archive(fd, destination_in(spool, keep_id=False), UID, GID, 1 << 30, Onlooker()).image)
        os.close(fd)
    assert IMAGE not in found
    assert {name[:-4] for name in found} == {IMAGE[:-4]}
    assert all(verify(spool / name) == [] for name in found)


def test_many_at_once(stream: bytes, spool: Path) -> None:
    found: list[str] = []

    def work() -> None:
        found.append(receive(stream, spool).image)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
    assert names(spool) == sorted(found)
    assert all(verify(spool / one) == [] for one in found)


# ---------------------------------------------------------------- a hostile stream

Entry = tuple[str, bytes]


def member(name: str, data: bytes = b'', **fields: Any) -> bytes:
    """One member. fields: of TarInfo; claim: a size other than that of the data."""
    info = tarfile.TarInfo(name)
    info.size = fields.pop('claim', len(data))
    for field, value in fields.items():
        setattr(info, field, value)
    # USTAR has no negative and no large numbers, and only GNU and pax have both
    form = tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT
    return info.tobuf(form) + data + bytes(-len(data) % BLOCK)


def altered(**fields: Any) -> bytes:
    """A good manifest in which something else stands."""
    return encode_manifest(manifest(**fields))


class Kit:
    """The pieces of a good stream, to put others together."""

    def __init__(self, image: Path) -> None:
        self.manifest = read_manifest(image)
        self.text = (image / NAME).read_bytes()
        self.parts = {name: (image / name).read_bytes() for name in part_order(self.manifest.parts)}
        self.tree = self.parts['tree.img']

    @property
    def head(self) -> bytes:
        return member(NAME, self.text)

    def rest(self, *without: str, below: str = '') -> bytes:
        return b''.join(member(below + name, data) for name, data in self.parts.items() if name not in without)

    def instead(self, name: str, made: bytes) -> bytes:
        """A stream with another member in place of that part."""
        return self.head + made + self.rest(name) + END

    def before(self, made: bytes) -> bytes:
        """A stream with something before the first part."""
        return self.head + made + self.rest() + END

    def consistent(self, name: str, data: bytes) -> bytes:
        """A part of other content, with the manifest that fits."""
        part = Part(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        text = altered(parts={**self.manifest.parts, name: part})
        return member(NAME, text) + self.rest(name) + member(name, data) + END


def global_pax() -> bytes:
    return member('g', b'20 comment=whatever\n', type=tarfile.XGLTYPE)


def pax(data: bytes, **fields: Any) -> bytes:
    return member('x', data, type=tarfile.XHDTYPE, **fields)


def record(key: str, value: str) -> bytes:
    body = f' {key}={value}\n'.encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


HOSTILE: dict[str, tuple[str, Callable[[Kit], bytes]]] = {
    # no such stream
    'nothing': ('ends at byte 0', lambda kit: b''),
    'text': ('ends at byte', lambda kit: b'this is no tar'),
    'long text': ('not a tar header', lambda kit: b'this is no tar\n' * 100),
    'compressed': ('not a tar header', lambda kit: gzip.compress(random.Random(1).randbytes(4 * BLOCK))),
    'zeros': ("begins with ''", lambda kit: bytes(10 * BLOCK)),
    'an empty archive': ("begins with ''", lambda kit: END),
    'a wrong checksum': ('bad checksum', lambda kit: kit.head.replace(b'0000644', b'0000645', 1) + kit.rest() + END),
    # names
    'absolute': ('a member', lambda kit: member(f'/{NAME}', kit.text) + kit.rest() + END),
    'above': ('a member', lambda kit: kit.before(member('../tree.img', kit.tree))),
    'above by a directory': ('a member', lambda kit: kit.before(member('x/../../tree.img', kit.tree))),
    'dot': ('a member', lambda kit: member(f'./{NAME}', kit.text) + kit.rest(below='./') + END),
    'no id': ('a member', lambda kit: member(f'sample/{NAME}', kit.text) + kit.rest(below='sample/') + END),
    'a level too many': ('a member', lambda kit: member(f'{IMAGE}/{IMAGE}/{NAME}', kit.text)),
    'two directories': ('a member', lambda kit: member(f'{IMAGE}/{NAME}', kit.text) + kit.rest(below=f'{OTHER}/')),
    'a directory and none': ('a member', lambda kit: member(f'{IMAGE}/{NAME}', kit.text) + kit.rest() + END),
    'none and a directory': ('a member', lambda kit: kit.head + kit.rest(below=f'{IMAGE}/') + END),
    'a slash': ('a member', lambda kit: kit.instead('tree.img', member('/tree.img', kit.tree))),
    'unknown': ('no part of it', lambda kit: kit.before(member('notes.txt', b'x'))),
    'an unnamed part': ('no part of it', lambda kit: kit.before(member('data-7.img', b'x'))),
    'a name with a newline': ('no part of it', lambda kit: kit.instead('tree.img', member('tree.img\n', kit.tree))),
    'no utf-8': ('no part of it', lambda kit: kit.before(member('\udcff.img', b'x'))),
    # kinds
    'a symbolic link': ('not a regular', lambda kit: kit.instead('tree.img', member(
        'tree.img', type=tarfile.SYMTYPE, linkname='/etc/shadow'))),
    'a hard link': ('not a regular', lambda kit: kit.instead('tree.img', member(
        'tree.img', type=tarfile.LNKTYPE, linkname='files.img'))),
    'a device': ('not a regular', lambda kit: kit.instead('tree.img', member(
        'tree.img', type=tarfile.CHRTYPE, devmajor=1, devminor=5))),
    'a block device': ('not a regular', lambda kit: kit.instead('tree.img', member('tree.img', type=tarfile.BLKTYPE))),
    'a fifo': ('not a regular', lambda kit: kit.instead('tree.img', member('tree.img', type=tarfile.FIFOTYPE))),
    'a contiguous file': ('not a regular', lambda kit: kit.instead('tree.img', member(
        'tree.img', kit.tree, type=tarfile.CONTTYPE))),
    'a directory inside': ('not a regular', lambda kit: kit.before(member('tree.img', type=tarfile.DIRTYPE))),
    'a directory of its name': ('not a regular', lambda kit: kit.before(member(IMAGE, type=tarfile.DIRTYPE))),
    'the directory twice': ('not a regular', lambda kit: member(IMAGE, type=tarfile.DIRTYPE) * 2 + kit.head),
    'a directory with a size': ('not a regular', lambda kit: member(IMAGE, b'x', type=tarfile.DIRTYPE) + kit.head),
    'a directory that is no id': ('not a regular', lambda kit: member('sample', type=tarfile.DIRTYPE) + kit.head),
    'a sparse file': ('not a regular', lambda kit: kit.instead('tree.img', member(
        'tree.img', kit.tree, type=tarfile.GNUTYPE_SPARSE))),
    'a long name': ('not a regular', lambda kit: kit.before(member('././@LongLink', b'tree.img\0', type=b'L'))),
    'a long link': ('not a regular', lambda kit: kit.before(member('././@LongLink', b'tree.img\0', type=b'K'))),
    'an unknown kind': ('not a regular', lambda kit: kit.before(member('tree.img', type=b'Z'))),
    # pax
    'a global header': ('not a regular', lambda kit: global_pax() + kit.head + kit.rest() + END),
    'a sparse file by pax': ('GNU.sparse.major', lambda kit: kit.before(pax(record('GNU.sparse.major', '1')))),
    'a name by pax': ("'path'", lambda kit: kit.before(pax(record('path', '/etc/shadow')))),
    'a size that is none': ('a size of', lambda kit: kit.before(pax(record('size', '-1')))),
    'a size in words': ('a size of', lambda kit: kit.before(pax(record('size', '\u0664')))),
    'a size without end': ('a size of', lambda kit: kit.before(pax(record('size', '9' * 4000)))),
    'another size by pax': ('bytes, not', lambda kit: kit.before(pax(record('size', '7')))),
    'one record twice': ('two pax records', lambda kit: kit.before(pax(record('mtime', '7') * 2))),
    'a record too long': ('an invalid pax header', lambda kit: kit.before(pax(b'99 mtime=7\n'))),
    'a record without end': ('an invalid pax header', lambda kit: kit.before(pax(b'11 mtime=77'))),
    'a record without length': ('an invalid pax header', lambda kit: kit.before(pax(b'mtime=7\n'))),
    'a record of nothing': ('an invalid pax header', lambda kit: kit.before(pax(b'0 mtime=7\n'))),
    'a negative record': ('an invalid pax header', lambda kit: kit.before(pax(b'-9 mtime=7\n'))),
    'a large pax header': ('a pax header of', lambda kit: kit.before(pax(record('comment', 'x' * MAX_PAX)))),
    'a huge pax header': ('a pax header of', lambda kit: kit.before(pax(b'x', claim=1 << 60))),
    'a negative pax header': ('a pax header of', lambda kit: kit.before(pax(b'', claim=-1))),
    'pax upon pax': ('not a regular', lambda kit: kit.before(pax(record('mtime', '7')) * 2)),
    'pax and no more': ('not a tar header', lambda kit: kit.head + pax(record('mtime', '7')) + END),
    # the manifest
    'the manifest last': ("begins with 'tree.img'", lambda kit: kit.rest() + kit.head + END),
    'the manifest twice': ('no part of it', lambda kit: kit.before(kit.head)),
    'no manifest': ("begins with 'tree.img'", lambda kit: kit.rest() + END),
    'a large manifest': ('a manifest.json of', lambda kit: member(NAME, claim=MAX_MANIFEST + 1)),
    'a negative manifest': ('a manifest.json of', lambda kit: member(NAME, kit.text, claim=-BLOCK)),
    'an empty manifest': ('digest', lambda kit: member(NAME) + kit.rest() + END),
    'an edited manifest': ('digest', lambda kit: member(NAME, kit.text.replace(b'sample', b'simple', 1)) + kit.rest()),
    'a manifest with the path of a part': ('parts', lambda kit: member(NAME, altered(
        parts={'../x': Part(size=1, sha256='0' * 64)}))),
    'a manifest of no id': ('not an image id', lambda kit: member(NAME, altered(image='../../etc'))),
    'a manifest of a later year': ('created_usec', lambda kit: member(NAME, altered(created_usec=1 << 60))),
    'a manifest of a later ckptd': ('newer than', lambda kit: member(NAME, altered(format=2))),
    'a manifest that lacks a part': ('part tree.img is not listed', lambda kit: member(NAME, altered(
        parts={key: value for key, value in kit.manifest.parts.items() if key != 'tree.img'})) + kit.rest('tree.img')
        + END),
    'other counts': ('tasks', lambda kit: member(NAME, altered(tasks=2, parts=kit.manifest.parts)) + kit.rest() + END),
    # sizes and content
    'too short': ('bytes, not', lambda kit: kit.instead('tree.img', member('tree.img', kit.tree[:-1]))),
    'too long': ('bytes, not', lambda kit: kit.instead('tree.img', member('tree.img', kit.tree + b'x'))),
    'negative': ('bytes, not', lambda kit: kit.instead('tree.img', member('tree.img', kit.tree, claim=-1))),
    'huge': ('bytes, not', lambda kit: kit.instead('tree.img', member('tree.img', kit.tree, claim=1 << 62))),
    'twice': ('there twice', lambda kit: kit.before(member('tree.img', kit.tree))),
    'missing': ('tree.img missing', lambda kit: kit.head + kit.rest('tree.img') + END),
    'all missing': ('missing', lambda kit: kit.head + END),
    'other content': ('digest', lambda kit: kit.instead('tree.img', member('tree.img', kit.tree[::-1]))),
    'other data': ('digest', lambda kit: kit.instead('data-0.img', member('data-0.img', bytes(2 * PAGE)))),
    'no records': ('not a TREE part', lambda kit: kit.consistent('tree.img', b'x' * 100)),
    'records of another part': ('not a TREE part', lambda kit: kit.consistent('tree.img', kit.parts['files.img'])),
    'a broken record': ('checksum', lambda kit: kit.consistent('tree.img', kit.tree[:40] + b'\xff' + kit.tree[41:])),
    'an empty part': ('cut short', lambda kit: kit.consistent('tasks.img', b'')),
    'data that ends early': ('are not in data-0.img', lambda kit: kit.consistent('data-0.img', b'')),
    # the end
    'no end': ('ends at byte', lambda kit: kit.head + kit.rest()),
    'half an end': ('ends at byte', lambda kit: kit.head + kit.rest() + bytes(BLOCK)),
    'half an end and more': ('half an end', lambda kit: kit.head + kit.rest() + bytes(BLOCK) + kit.head),
    'garbage behind': ('more follows', lambda kit: kit.head + kit.rest() + END + b'x'),
    'another archive behind': ('more follows', lambda kit: (kit.head + kit.rest() + END) * 2),
    'zeros without end': ('more follows', lambda kit: kit.head + kit.rest() + bytes(MAX_PADDING + 3 * BLOCK)),
    'padding with something in it': ('no padding', lambda kit: kit.head[:-1] + b'x' + kit.rest() + END),
}


@pytest.fixture(scope='module')
def kit(image: Path) -> Kit:
    return Kit(image)


def test_the_kit_is_good(kit: Kit, spool: Path) -> None:
    """What is refused below is refused for what is wrong with it."""
    for good in (kit.before(b''), kit.before(pax(record('mtime', '7.5') + record('size', str(len(kit.tree))))),
                 kit.instead('tree.img', member('tree.img', kit.tree, type=tarfile.AREGTYPE)),
                 kit.consistent('tree.img', kit.tree), member(IMAGE, type=tarfile.DIRTYPE) + member(
                     f'{IMAGE}/{NAME}', kit.text) + kit.rest(below=f'{IMAGE}/') + END,
                 kit.head + kit.rest() + bytes(MAX_PADDING)):
        receive(good, spool)
        shutil.rmtree(spool / IMAGE)


@pytest.mark.parametrize('name', HOSTILE)
def test_it_is_refused(name: str, kit: Kit, spool: Path) -> None:
    words, make = HOSTILE[name]
    with pytest.raises(ImageDamaged, match=re.escape(words)) as caught:
        receive(make(kit), spool)
    assert names(spool) == []
    assert 'ckptctl verify' not in caught.value.hint      # there is no image to verify
    assert caught.value.hint


def test_more_than_is_allowed(stream: bytes, kit: Kit, spool: Path) -> None:
    size = kit.manifest.size
    read = 0

    def count(call: str) -> None:
        nonlocal read
        read += call == 'wait'

    with pytest.raises(LimitsExceeded, match=f'has {size} bytes, {size - 1} are allowed'):
        receive(stream, spool, limit=size - 1, watcher=Onlooker(count))
    assert names(spool) == []
    assert read < 10        # the manifest, and none of the parts
    assert receive(stream, spool, limit=size).size == size


def test_more_than_there_is_room_for(kit: Kit, spool: Path) -> None:
    """Whatever the limit: found before anything is written."""
    parts = {**kit.manifest.parts, 'data-0.img': Part(size=(1 << 63) - 1, sha256='0' * 64)}
    with pytest.raises(SpoolFailed) as caught:
        receive(member(NAME, altered(parts=parts)) + member('data-0.img', bytes(PAGE), claim=1 << 62), spool,
                limit=1 << 64)
    assert caught.value.errno == errno.ENOSPC
    assert names(spool) == []


def test_truncated(stream: bytes, spool: Path) -> None:
    ends = {*range(0, len(stream), 331), *range(0, len(stream), BLOCK), len(stream) - 1}
    for end in sorted(ends):
        with pytest.raises(ImageDamaged):
            receive(stream[:end], spool)
        assert names(spool) == [], f'{end} bytes'


def reseal(block: bytes) -> bytes:
    """A tar header with the checksum that fits."""
    total = sum(block[:148]) + 256 + sum(block[156:])
    return block[:148] + b'%06o\0 ' % total + block[156:]


def mutation(stream: bytes, chance: random.Random) -> bytes:
    """The same with bits flipped, blocks moved, or a header that says something else."""
    blocks = [stream[at:at + BLOCK] for at in range(0, len(stream), BLOCK)]
    match chance.randrange(5):
        case 0:
            made = bytearray(stream)
            for _ in range(chance.randint(1, 4)):
                made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
            return bytes(made)
        case 1:
            first, second = chance.randrange(len(blocks)), chance.randrange(len(blocks))
            blocks[first], blocks[second] = blocks[second], blocks[first]
        case 2:
            del blocks[chance.randrange(len(blocks))]
        case 3:
            blocks.insert(chance.randrange(len(blocks)), chance.choice(blocks))
        case _:
            headers = [at for at, block in enumerate(blocks) if block[257:262] == b'ustar']
            at = chance.choice(headers)
            made = bytearray(blocks[at])
            for _ in range(chance.randint(1, 3)):
                made[chance.choice([chance.randrange(100), chance.randrange(124, 136), 156, chance.randrange(BLOCK)])
                     ] = chance.randrange(256)
            blocks[at] = reseal(bytes(made))
    return b''.join(blocks)


def test_mutations(image: Path, stream: bytes, spool: Path) -> None:
    """Each is refused, or is the same image: what a header says of times and owners means nothing."""
    chance, outcomes = random.Random(20240131), {True: 0, False: 0}
    wanted, deadline = contents(image), time.monotonic() + 0.5
    while time.monotonic() < deadline or outcomes[False] <= 20 or not outcomes[True]:
        made = mutation(stream, chance)
        try:
            got = receive(made, spool)
        except ImageDamaged:
            assert names(spool) == []
            outcomes[False] += 1
        else:
            assert verify(spool / got.image) == []
            assert contents(spool / got.image) == wanted
            shutil.rmtree(spool / got.image)
            outcomes[True] += 1


def test_memory(kit: Kit, tmp_path: Path, spool: Path) -> None:
    """A few MiB, whatever a header claims and however large a part is."""
    size = 64 << 20
    part = Part(size=size, sha256=hashlib.sha256(bytes(size)).hexdigest())
    text = altered(parts={**kit.manifest.parts, 'data-0.img': part})
    path = tmp_path / 'stream'
    with path.open('wb') as file:
        file.write(member(NAME, text) + kit.rest('data-0.img') + member('data-0.img', claim=size))
        file.seek(size, os.SEEK_CUR)
        file.write(END)
    streams = [path]
    for number, hostile in enumerate((pax(b'', claim=1 << 33), member(NAME, claim=1 << 33), member(
            IMAGE, type=tarfile.DIRTYPE, claim=1 << 33), member('x', type=b'L', claim=1 << 33))):
        streams.append(tmp_path / f'hostile{number}')
        with streams[-1].open('wb') as file:
            file.write(hostile)
            file.truncate(1 << 34)
    for one in streams:
        tracemalloc.start()
        try:
            with one.open('rb') as file:
                if one == path:
                    read_archive(file.fileno(), destination_in(spool), UID, GID, 1 << 30, Onlooker())
                else:
                    with pytest.raises(ImageDamaged):
                        read_archive(file.fileno(), destination_in(spool), UID, GID, 1 << 30, Onlooker())
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()
    assert names(spool) == [IMAGE]


IN_ITS_OWN_PROCESS = """
import os, resource, sys
from pathlib import Path
from ckptd.errors import LimitsExceeded
from ckptd.image.archive import unpack
from tests.unit.image.test_archive import Onlooker

rows = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())
unpack.MEMORY = (int(rows['VmData'].split()[0]) << 10) + (48 << 20)      # what RLIMIT_DATA counts, and more
before = resource.getrlimit(resource.RLIMIT_DATA)
try:
    unpack.read_archive(0, unpack.destination_in(Path(sys.argv[1])), 1, 1, 1 << 30, Onlooker())
except LimitsExceeded as error:
    assert 'MiB of memory' in str(error), error
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    print('refused')
"""


def test_records_that_take_all_memory(kit: Kit, spool: Path, tmp_path: Path) -> None:
    """Nine bytes for each fd, and hundreds in the memory of who checks them. In a process of its own: here the memory
    that earlier tests have given back would do."""
    table = r.FdTable(1, tuple(r.Fd(number, number, 0) for number in range(1 << 18)))
    stream = kit.consistent('files.img', encode_header(b'FILE') + encode_record(table) + encode_end(1))
    (tmp_path / 'stream').write_bytes(stream)
    with (tmp_path / 'stream').open('rb') as source:
        done = subprocess.run([sys.executable, '-c', IN_ITS_OWN_PROCESS, spool], stdin=source, capture_output=True,
                              text=True, check=False, cwd=Path(__file__).parents[3])
    assert (done.stdout, done.returncode) == ('refused\n', 0), done.stderr
    assert names(spool) == []


def test_pax_records() -> None:
    assert parse_pax(b'') == {}
    assert parse_pax(record('mtime', '1.5') + record('uname', 'a=b\nc')) == {'mtime': '1.5', 'uname': 'a=b\nc'}


# ---------------------------------------------------------------- trouble on the way

def test_cancelled_at_every_call(stream: bytes, spool: Path) -> None:
    usual = Onlooker()
    receive(stream, spool, watcher=usual)
    shutil.rmtree(spool / IMAGE)
    for number in range(1, len(usual.calls) + 1):
        left = number

        def act(call: str) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Cancelled('enough')

        with pytest.raises(Cancelled):
            receive(stream, spool, watcher=Onlooker(act))
        assert names(spool) == [], f'call {number}: {usual.calls[number - 1]}'


def test_it_is_locked_while_it_is_received(stream: bytes, spool: Path) -> None:
    """Who clears the spool of what dead writers left keeps away."""
    seen = []

    def act(call: str) -> None:
        if call == 'progress':
            fd = os.open(spool / f'{INCOMING}{IMAGE}', os.O_RDONLY)
            try:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                seen.append(names(spool))
            finally:
                os.close(fd)

    receive(stream, spool, watcher=Onlooker(act))
    assert seen
    assert all(one == [INCOMING + IMAGE] for one in seen)


@pytest.mark.parametrize('how', ['closed', 'write only', 'directory'])
def test_an_fd_that_cannot_be_read(how: str, tmp_path: Path, spool: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY) if how == 'directory' else os.open('/dev/null', os.O_WRONLY)
    if how == 'closed':
        os.close(fd)
    try:
        with pytest.raises(CkptError, match='cannot read the stream') as caught:
            read_archive(fd, destination_in(spool), UID, GID, 1 << 30, Onlooker())
    finally:
        if how != 'closed':
            os.close(fd)
    assert caught.value.errno == (errno.EISDIR if how == 'directory' else errno.EBADF)
    assert names(spool) == []


def fill(directory: Path) -> None:
    """Leave no page free."""
    with (directory / 'others').open('ab', buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(PAGE)):
            continue


@pytest.mark.needs('root')
@pytest.mark.parametrize('moment', ['before', 'progress', 'verify'])
def test_a_full_disk(larger: Path, kit: Kit, tmpfs: Path, moment: str) -> None:
    """The image is too large, or others take the room while it is received, or the last of it before the manifest."""
    good = kit.before(b'')
    if moment == 'before':
        good = stream_of(larger)

    def act(call: str) -> None:
        if call == moment:
            fill(tmpfs)

    with pytest.raises(SpoolFailed) as caught:
        receive(good, tmpfs, watcher=Onlooker(act))
    assert caught.value.errno == errno.ENOSPC
    assert 'free space' in caught.value.hint
    assert names(tmpfs) == ([] if moment == 'before' else ['others'])


def test_a_spool_that_is_gone(stream: bytes, tmp_path: Path) -> None:
    with pytest.raises(SpoolFailed) as caught:
        receive(stream, tmp_path / 'gone')
    assert caught.value.errno == errno.ENOENT


def test_an_error_of_the_disk_at_fsync(stream: bytes, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        if os.readlink(f'/proc/self/fd/{fd}').endswith('data-0.img'):  # noqa: PTH115
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr('ckptd.image.archive.unpack.os.fsync', fsync)
    with pytest.raises(SpoolFailed, match=r'data-0\.img: Input/output error'):
        receive(stream, spool)
    assert names(spool) == []


def test_python_reads_it(stream: bytes, kit: Kit) -> None:
    """A second opinion on the format: tarfile, as an unseekable stream."""
    with tarfile.open(fileobj=io.BytesIO(stream), mode='r|') as tar:
        found = {one.name: (file.read() if (file := tar.extractfile(one)) else b'') for one in tar if one.isreg()}
    assert found == {f'{IMAGE}/{name}': data for name, data in {NAME: kit.text, **kit.parts}.items()}
