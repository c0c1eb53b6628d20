# SPDX-License-Identifier: LGPL-2.1-or-later
"""The spool: the directory of images, and who may touch them.

    {spool}/                     0700
        20260131_120000_sort_9f3a/     a published image; its manifest.json names the owner
        .incoming-ID/                  being written, flock held by the worker; or left by a dead one

An image that is removed first becomes .incoming-ID: from then on it was never published, and a daemon that dies in
between removes the rest at its next start, as it does with what a dead worker left.

Calls marked so touch the disk: in a daemon they run in a thread.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ckptd.config import INFINITY
from ckptd.errors import CkptError, NoSuchImage, PermissionDenied, SpoolFailed
from ckptd.image.ids import is_image_id
from ckptd.image.manifest import Manifest, read_manifest
from ckptd.image.writer import INCOMING, remove_stale

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SpooledImage:
    """What a manifest says of its image. created: real-time microseconds. size: bytes of all parts.

    damage: why the manifest could not be read; the image then belongs to whoever owns its directory.
    """
    id: str
    path: Path
    owner: int
    target: str = ''
    command: str = ''
    created: int = 0
    tasks: int = 0
    processes: int = 0
    size: int = 0
    kernel: str = ''
    architecture: str = ''
    boot_id: str = ''
    statistics: dict[str, int] = field(default_factory=dict)
    damage: str = ''

    def check_owner(self, uid: int, verb: str) -> None:
        """PermissionDenied unless `uid` owns the image or is root."""
        if uid not in (0, self.owner):
            raise PermissionDenied(f'image {self.id} belongs to uid {self.owner}: uid {uid} may not {verb} it',
                                   resource=self.id, hint='ask its owner, or root')


class Spool:
    """The images that are there, as `adopt` last heard of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.capacity = INFINITY        # bytes of the file system that it is on, once that was asked
        self._images: dict[str, SpooledImage] = {}
        self._usage: dict[int | None, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._images)

    @property
    def images(self) -> list[SpooledImage]:
        """Oldest first: an id begins with its date."""
        return list(self._images.values())

    def prepare(self) -> None:
        """Make the directory (0700) and see that it can be written. Disk."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.directory))
            with contextlib.suppress(FileNotFoundError):    # another daemon may take it for a stale entry
                probe.rmdir()
            file_system = os.statvfs(self.directory)
            self.capacity = file_system.f_blocks * file_system.f_frsize
            if self.directory.stat().st_mode & 0o022:
                log.warning('spool %s can be written by others than its owner', self.directory)
        except OSError as error:
            raise SpoolFailed(f'spool {self.directory}: {error.strerror}', errno=error.errno,
                              resource=str(self.directory),
                              hint='run as a user who may write there, or name another with --spool DIR') from error

    def look(self) -> dict[str, SpooledImage]:
        """What is on the disk now. For a thread: it changes nothing here. Disk."""
        try:
            with os.scandir(self.directory) as entries:
                names = {entry.name: Path(entry.path) for entry in entries
                         if is_image_id(entry.name) and entry.is_dir(follow_symlinks=False)}
        except OSError as error:
            # no spool, no images; whoever writes next gets the clear error
            log.warning('spool %s: %s', self.directory, error.strerror)
            return {}
        known = self._images
        return {name: known.get(name) or _describe(name, path) for name, path in names.items()}

    def adopt(self, found: dict[str, SpooledImage]) -> tuple[list[SpooledImage], list[SpooledImage]]:
        """Take over what `look` saw: (images that are new, those that are gone)."""
        before, self._images = self._images, dict(sorted(found.items()))
        self._usage = {}
        for info in found.values():
            for uid in (None, info.owner):
                images, size = self._usage.get(uid, (0, 0))
                self._usage[uid] = images + 1, size + info.size
        return ([found[name] for name in sorted(found.keys() - before.keys())],
                [before[name] for name in sorted(before.keys() - found.keys())])

    def get(self, image: str) -> SpooledImage | None:
        return self._images.get(image)

    def find(self, image: str) -> SpooledImage:
        info = self._images.get(image)
        if info is None:
            raise NoSuchImage(f'there is no image {image[:128]!r} in {self.directory}', resource=image[:128])
        return info

    def usage(self, uid: int | None) -> tuple[int, int]:
        """Images and bytes that a uid owns, or all."""
        return self._usage.get(uid, (0, 0))

    def remove(self, info: SpooledImage) -> None:
        """Disk. NoSuchImage when somebody else was faster."""
        doomed = self.directory / f'{INCOMING}{info.id}'
        try:
            info.path.rename(doomed)
        except FileNotFoundError:
            raise NoSuchImage(f'image {info.id} is gone', resource=info.id) from None
        except OSError as error:
            raise SpoolFailed(f'cannot remove image {info.id}: {error.strerror}', errno=error.errno,
                              resource=info.id, hint='see why the spool cannot be written') from error
        # what the disk will not give up now is removed at the next start
        shutil.rmtree(doomed, ignore_errors=True)

    def unfinished(self) -> list[tuple[str, Path]]:
        """(id, directory) of images that were not published, or not yet. Disk. OSError."""
        return [(path.name.removeprefix(INCOMING), path) for path in self.directory.iterdir()
                if path.name.startswith(INCOMING)]

    def remove_stale(self) -> list[str]:
        """Remove what was never published and whose writer is dead; ids of the images. Disk."""
        return remove_stale(self.directory)


def _describe(name: str, path: Path) -> SpooledImage:
    try:
        manifest = read_manifest(path)
    except (CkptError, OSError) as error:
        return SpooledImage(name, path, owner=_owner_of(path), damage=str(error))
    return _from_manifest(name, path, manifest)


def _owner_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_uid
    return 0


def _from_manifest(name: str, path: Path, manifest: Manifest) -> SpooledImage:
    return SpooledImage(
        name, path, owner=manifest.owner_uid, target=manifest.target, command=manifest.command,
        created=manifest.created_usec, tasks=manifest.tasks, processes=manifest.processes,
        size=manifest.size, kernel=manifest.kernel,
        architecture=manifest.architecture, boot_id=manifest.boot_id,
        statistics=msgspec.structs.asdict(manifest.statistics))
