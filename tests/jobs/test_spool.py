# SPDX-License-Identifier: LGPL-2.1-or-later
"""The spool directory: what is in it, whose it is, and how it goes."""

import asyncio
import fcntl
import os
from pathlib import Path

import pytest

from ckptd.errors import NoSuchImage, PermissionDenied, SpoolFailed
from ckptd.image.ids import new_image_id
from ckptd.image.manifest import Manifest, Statistics
from ckptd.image.writer import ImageWriter, Incoming
from ckptd.jobs.spool import Spool
from ckptd.jobs.watch import SpoolWatch


def write_image(spool: Path, owner: int = 1000, command: str = 'sort', target: str = 'pid:1') -> str:
    """A published image without a tree in it."""
    image = new_image_id(command)
    while (spool / image).exists():     # of many in one second two may be called the same
        image = new_image_id(command)
    with ImageWriter(Incoming(spool, image)) as writer:
        writer.publish(Manifest(
            image=writer.image, created_usec=7, ckptd_version='0', kernel='6.18', boot_id='b', owner_uid=owner,
            owner_gid=owner, target=target, root=1, command=command, tasks=3, processes=2, freeze_mode='cgroup',
            statistics=Statistics(frozen_time=9)))
        return writer.image


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def looked(directory: Path) -> Spool:
    spool = Spool(directory)
    spool.adopt(spool.look())
    return spool


def test_an_image_is_what_its_manifest_says(spool: Path) -> None:
    image = write_image(spool)
    (spool / 'lost+found').mkdir()
    (spool / '.incoming-x').mkdir()
    [info] = looked(spool).images
    assert (info.id, info.owner, info.command, info.tasks, info.processes) == (image, 1000, 'sort', 3, 2)
    assert info.statistics['frozen_time'] == 9
    assert info.size == sum(path.stat().st_size for path in (spool / image).iterdir() if path.suffix == '.img')
    assert looked(spool).usage(1000) == (1, info.size)


def test_an_image_without_a_manifest_is_shown_as_damaged(spool: Path) -> None:
    image = write_image(spool)
    (spool / image / 'manifest.json').unlink()
    info = looked(spool).find(image)
    assert 'manifest.json' in info.damage
    assert info.owner == os.getuid()


def test_a_link_is_no_image(spool: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path)
    (spool / image).symlink_to(tmp_path / image)
    assert looked(spool).images == []


def test_what_came_and_went(spool: Path) -> None:
    seen = looked(spool)
    first, second = sorted((write_image(spool), write_image(spool)))
    added, gone = seen.adopt(seen.look())
    assert ([info.id for info in added], gone) == ([first, second], [])
    seen.remove(seen.find(first))
    added, gone = seen.adopt(seen.look())
    assert (added, [info.id for info in gone]) == ([], [first])
    assert names(spool) == [second]


def test_only_the_owner_and_root(spool: Path) -> None:
    image = write_image(spool, owner=1000)
    info = looked(spool).find(image)
    for uid in (0, 1000):
        info.check_owner(uid, 'remove')
    with pytest.raises(PermissionDenied, match='uid 1001 may not remove it'):
        info.check_owner(1001, 'remove')


def test_a_name_that_is_no_image(spool: Path) -> None:
    for name in ('../etc', '', 'x' * 5000):
        with pytest.raises(NoSuchImage) as caught:
            looked(spool).find(name)
        assert len(str(caught.value)) < 1000


def test_who_is_slower_finds_nothing(spool: Path) -> None:
    write_image(spool)
    one, two = looked(spool), looked(spool)
    one.remove(one.images[0])
    with pytest.raises(NoSuchImage, match='was removed by another process'):
        two.remove(two.images[0])


def test_stale_entries_go_and_live_ones_stay(spool: Path) -> None:
    (spool / '.incoming-dead').mkdir()
    (spool / '.incoming-alive').mkdir()
    fd = os.open(spool / '.incoming-alive', os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert Spool(spool).remove_stale() == ['dead']
    finally:
        os.close(fd)
    assert names(spool) == ['.incoming-alive']


def test_prepare_makes_it_for_us_alone(tmp_path: Path) -> None:
    Spool(tmp_path / 'a/b').prepare()
    assert (tmp_path / 'a/b').stat().st_mode & 0o777 == 0o700
    assert names(tmp_path / 'a/b') == []


def test_prepare_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(SpoolFailed, match='file/spool: Not a directory') as caught:
        Spool(tmp_path / 'file/spool').prepare()
    assert '--spool' in caught.value.hint


def test_a_spool_that_vanished_has_no_images(tmp_path: Path) -> None:
    assert looked(tmp_path / 'gone').images == []


async def test_the_watch_sees_images_of_others(spool: Path) -> None:
    seen = asyncio.Event()
    with SpoolWatch(spool, seen.set):
        image = await asyncio.to_thread(write_image, spool)
        await asyncio.wait_for(seen.wait(), 10)
        seen.clear()
        (spool / image).rename(spool / '.incoming-x')
        await asyncio.wait_for(seen.wait(), 10)
    await asyncio.get_running_loop().shutdown_default_executor()
