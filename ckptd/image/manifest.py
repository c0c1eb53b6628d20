# SPDX-License-Identifier: LGPL-2.1-or-later
"""manifest.json: the description of an image, written last. It is JSON for people and tools, sealed by its own digest.

    {
      "format": 1,
      "image": "20240131_235959_sleep_3fa9",
      ...
      "parts": {
        "data-0.img": {"size": 4096, "sha256": "..."},
        ...
      },
      "digest": "<sha256 of every byte before this line>"
    }

An edited manifest no longer matches its digest, which is damage as in any other part.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.grammar import FORMAT
from ckptd.image.ids import is_image_id
from ckptd.image.source import ImageFiles, files_of

NAME = 'manifest.json'
MAX_MANIFEST = 4 << 20

_TAIL = re.compile(rb',\n  "digest": "([0-9a-f]{64})"\n}\n')
_TAIL_SIZE = len(',\n  "digest": ""\n}\n') + 64

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Offset = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]
Uid = Annotated[int, Meta(ge=0, lt=1 << 32)]
Moment = Annotated[int, Meta(ge=0, lt=253_402_300_800 * 10**6)]      # microseconds; later years have five digits
Text = Annotated[str, Meta(max_length=4096)]
PartName = Annotated[str, Meta(pattern=r'^(tree|tasks|files|memory|data-(0|[1-9][0-9]{0,4}))\.img\Z')]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the image: its size in bytes, and sha256 as 64 hexadecimal digits."""
    size: Count
    sha256: Annotated[str, Meta(pattern=r'^[0-9a-f]{64}\Z')]


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Times in microseconds, and numbers of pages."""
    freezing_time: Count = 0    # until all tasks were frozen
    frozen_time: Count = 0      # how long the tree was frozen
    memdump_time: Count = 0     # reading memory
    memwrite_time: Count = 0    # writing memory and bringing it to the disk
    total_time: Count = 0       # the whole job
    pages_scanned: Count = 0
    pages_written: Count = 0


class Clocks(msgspec.Struct, frozen=True, kw_only=True):
    """CLOCK_MONOTONIC and CLOCK_BOOTTIME in nanoseconds at the moment of the dump, as the first root saw them. They
    include the offsets of its time namespace (time_namespaces(7))."""
    monotonic: Count = 0
    boottime: Count = 0
    monotonic_offset: Offset = 0
    boottime_offset: Offset = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of manifest.json."""
    format: Annotated[int, Meta(ge=1, lt=1 << 16)] = FORMAT
    image: Text
    created_usec: Moment    # realtime
    ckptd_version: Text
    kernel: Text            # release of the kernel
    architecture: Text = 'x86-64'
    boot_id: Text
    owner_uid: Uid
    owner_gid: Uid
    target: Text     # as in the request
    root: Count      # vpid of the first root
    command: Text    # comm of the first root
    tasks: Count
    processes: Count
    freeze_mode: Text    # what froze the tree
    clocks: Clocks = Clocks()
    statistics: Statistics = Statistics()
    warnings: tuple[Finding, ...] = ()    # what the image lacks
    imported: bool = False                # it came as a stream, so its tree may never have existed; the owner is the
                                          # importing user
    own_pidns: bool = False               # the tree lived in another pid namespace than the machine's processes
    names: Count = 0                      # how many things the checkpoint made outside of the image: names of deleted
                                          # files, and filters that hold connections
    parts: dict[PartName, Part] = {}      # by file name

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts.values())


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode manifest.json."""
    text = msgspec.json.format(msgspec.json.encode(_printable(msgspec.to_builtins(manifest))), indent=2)
    body = text.removesuffix(b'\n}')
    return body + b',\n  "digest": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def _printable(value: Any) -> Any:
    # a comm or path is bytes, kept as surrogates where it is not UTF-8. JSON has no surrogates, so use U+FFFD.
    if isinstance(value, str):
        return value.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(item) for item in value]
    return value


def decode_manifest(data: bytes) -> Manifest:
    """Decode a manifest. ImageDamaged if digest, types or bounds do not fit."""
    tail = _TAIL.fullmatch(data[-_TAIL_SIZE:])
    if tail is None or hashlib.sha256(data[:-_TAIL_SIZE]).hexdigest() != tail[1].decode():
        raise ImageDamaged(f'{NAME}: its digest does not match its content', resource=NAME)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ImageDamaged(f'{NAME}: {error}', resource=NAME) from error
    if manifest.format > FORMAT:
        raise ImageDamaged(f'{NAME}: format {manifest.format} is newer than this ckptd ({FORMAT})', resource=NAME,
                           hint='use the ckptd that wrote the image, or a newer one')
    if not is_image_id(manifest.image):
        raise ImageDamaged(f'{NAME}: "{manifest.image}" is not an image id', resource=NAME)
    return manifest


def read_manifest_of(files: ImageFiles) -> Manifest:
    """Read the manifest among the files of an image. ImageDamaged."""
    fd = files.open(NAME)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_MANIFEST:
            raise ImageDamaged(f'{NAME} is larger than {MAX_MANIFEST} bytes', resource=NAME)
        return decode_manifest(os.pread(fd, size, 0))
    except OSError as error:
        raise ImageDamaged(f'{NAME} cannot be read: {error.strerror}', resource=NAME) from error
    finally:
        os.close(fd)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of the image in `directory`. ImageDamaged."""
    with files_of(directory) as files:
        return read_manifest_of(files)
