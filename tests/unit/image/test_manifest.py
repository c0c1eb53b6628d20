# SPDX-License-Identifier: LGPL-2.1-or-later
"""manifest.json: typed, bounded, and sealed by its digest."""

import hashlib
import json
import os
import re
from pathlib import Path

import msgspec
import pytest

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.manifest import MAX_MANIFEST, Manifest, Part, decode_manifest, encode_manifest, read_manifest
from tests.unit.image.samples import manifest

PART = {'size': 1, 'sha256': '0' * 64}
WARNING = Finding(7, 'sample', 'fd 3', 'EOPNOTSUPP', 'a terminal is kept as a reference', '', 'warning')


def resealed(data: bytes) -> bytes:
    """The same with the digest that fits: what a forger would do."""
    body = data[:data.rindex(b',\n  "digest"')]
    return body + b',\n  "digest": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def changed(**fields: object) -> bytes:
    """A well sealed manifest that says something else."""
    content = {**json.loads(encode_manifest(manifest())), **fields}
    del content['digest']
    return resealed(json.dumps(content, indent=2).removesuffix('\n}').encode() + b',\n  "digest"')


def test_a_manifest_comes_back() -> None:
    full = manifest(warnings=(WARNING,), parts={'tree.img': Part(size=1, sha256='0' * 64)})
    assert decode_manifest(encode_manifest(full)) == full


def test_it_is_json_for_others() -> None:
    content = json.loads(encode_manifest(manifest(parts={'tree.img': Part(size=9, sha256='0' * 64)})))
    assert content['statistics'].keys() >= {'freezing_time', 'frozen_time', 'memdump_time', 'memwrite_time',
                                            'pages_scanned', 'pages_written'}
    assert content['parts']['tree.img'] == {'size': 9, 'sha256': '0' * 64}


def test_names_that_are_no_utf8() -> None:
    assert decode_manifest(encode_manifest(manifest(command='a\udcff'))).command == 'a\ufffd'


def test_every_flipped_bit_and_every_prefix_is_damage() -> None:
    data = encode_manifest(manifest())
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ImageDamaged):
            decode_manifest(bytes(flipped))
    for end in range(len(data)):
        with pytest.raises(ImageDamaged):
            decode_manifest(data[:end])
    with pytest.raises(ImageDamaged):
        decode_manifest(data + b'\n')


def test_unknown_fields_of_a_later_ckptd_are_read_over() -> None:
    assert decode_manifest(changed(mood='good')) == manifest()


@pytest.mark.parametrize('fields', [
    {'format': 0}, {'format': 2}, {'tasks': -1}, {'tasks': 1 << 64}, {'tasks': '1'}, {'tasks': None},
    {'owner_uid': 1 << 32}, {'image': '../../etc'}, {'image': 'x' * 5000}, {'parts': []},
    {'parts': {'../x': PART}}, {'parts': {'data-00.img': PART}}, {'parts': {'tree.img\n': PART}},
    {'parts': {'tree.img': {**PART, 'size': -1}}}, {'parts': {'tree.img': {**PART, 'sha256': 'x'}}},
    {'warnings': [{'pid': 1}]}, {'statistics': {'frozen_time': 1.5}},
], ids=str)
def test_a_hostile_field(fields: dict[str, object]) -> None:
    with pytest.raises(ImageDamaged):
        decode_manifest(changed(**fields))


@pytest.mark.parametrize('body', [b'', b'{', b'[' * 100_000, b'null', b'{"a": "\xff"', b'{"format": 1'])
def test_a_hostile_text(body: bytes) -> None:
    with pytest.raises(ImageDamaged):
        decode_manifest(resealed(body + b',\n  "digest"'))


def test_a_field_that_is_missing() -> None:
    data = re.sub(rb'  "kernel": .*\n', b'', encode_manifest(manifest()))
    with pytest.raises(ImageDamaged, match='kernel'):
        decode_manifest(resealed(data))


def test_what_lies_there_instead(tmp_path: Path) -> None:
    path = tmp_path / 'manifest.json'
    good = encode_manifest(manifest())

    def damage() -> str:
        with pytest.raises(ImageDamaged) as caught:
            read_manifest(tmp_path)
        if path.is_symlink() or path.exists():
            path.unlink()
        return caught.value.message

    assert 'missing' in damage()
    os.mkfifo(path)
    assert 'not a regular file' in damage()
    (tmp_path / 'other').write_bytes(good)
    path.symlink_to(tmp_path / 'other')
    assert 'cannot be opened' in damage()
    path.touch()
    os.truncate(path, MAX_MANIFEST + 1)
    assert 'larger' in damage()
    path.write_bytes(good)
    assert read_manifest(tmp_path) == manifest()
    with pytest.raises(ImageDamaged, match='cannot be opened'):
        read_manifest(tmp_path / 'nowhere')


def test_the_size_of_an_image() -> None:
    parts = {f'data-{number}.img': Part(size=number, sha256='0' * 64) for number in (1, 2)}
    assert msgspec.structs.replace(manifest(), parts=parts).size == 3
    assert isinstance(manifest(), Manifest)
