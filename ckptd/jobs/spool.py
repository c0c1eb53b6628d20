# SPDX-License-Identifier: LGPL-2.1-or-later
"""The spool: the directory of images, and the rights to them.

    {spool}/                     0700
        20260131_120000_sort_9f3a/     a published image; its manifest.json names the owner
        .incoming-ID/                  being written, flock held by the worker; or left by a dead one

An image that is removed is first renamed to .incoming-ID, so it counts as unpublished. If the daemon dies in between,
its next start removes the rest, as it does for images of dead workers.

Methods marked "Disk" access the disk. A daemon runs them in a thread.
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
    """The contents of an image's manifest."""
    id: str
    path: Path
    owner: int
    target: str = ''
    command: str = ''
    created: int = 0    # real-time microseconds
    tasks: int = 0
    processes: int = 0
    size: int = 0    # bytes of all parts
    kernel: str = ''
    architecture: str = ''
    boot_id: str = ''
    statistics: dict[str, int] = field(default_factory=dict)
    names: int = 0      # how many things the checkpoint made outside of the image, see Manifest.names
    damage: str = ''    # why the manifest could not be read; the image then belongs to the owner of its directory

    def check_owner(self, uid: int, verb: str) -> None:
        """Check that `uid` owns the image or is root. PermissionDenied."""
        if uid not in (0, self.owner):
            raise PermissionDenied(f'image {self.id} belongs to uid {self.owner}: uid {uid} may not {verb} it',
                                   resource=self.id, hint='ask its owner, or root')


class Spool:
    """The images in the spool, as of the last `adopt`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.capacity = INFINITY        # bytes of the spool's file system, once it was asked
        self._images: dict[str, SpooledImage] = {}
        self._usage: dict[int | None, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._images)

    @property
    def images(self) -> list[SpooledImage]:
        """Return all images, oldest first, since an id begins with its date."""
        return list(self._images.values())

    def prepare(self) -> None:
        """Make the directory (0700) and check that it is writable. Disk."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.directory))
            with contextlib.suppress(FileNotFoundError):    # another daemon may remove it as a stale entry
                probe.rmdir()
            file_system = os.statvfs(self.directory)
            self.capacity = file_system.f_blocks * file_system.f_frsize
            if self.directory.stat().st_mode & 0o022:
                log.warning('spool %s is writable by users other than its owner', self.directory)
        except OSError as error:
            raise SpoolFailed(f'spool {self.directory}: {error.strerror}', errno=error.errno,
                              resource=str(self.directory),
                              hint='choose another spool with --spool DIR, or run as its owner') from error

    def look(self) -> dict[str, SpooledImage]:
        """Return what is on the disk now. It changes nothing in this object, so it can run in a thread. Disk."""
        try:
            with os.scandir(self.directory) as entries:
                names = {entry.name: Path(entry.path) for entry in entries
                         if is_image_id(entry.name) and entry.is_dir(follow_symlinks=False)}
        except OSError as error:
            # Without a spool there are no images. The next job that writes gets the full error.
            log.warning('spool %s: %s', self.directory, error.strerror)
            return {}
        known = self._images
        return {name: known.get(name) or _describe(name, path) for name, path in names.items()}

    def adopt(self, found: dict[str, SpooledImage]) -> tuple[list[SpooledImage], list[SpooledImage]]:
        """Take over the result of `look`. Return (new images, removed images)."""
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
            raise NoSuchImage(f'no image {image[:128]!r} in {self.directory}', resource=image[:128])
        return info

    def usage(self, uid: int | None) -> tuple[int, int]:
        """Return (images, bytes) that a uid, or all users, own."""
        return self._usage.get(uid, (0, 0))

    def remove(self, info: SpooledImage) -> None:
        """Remove an image. NoSuchImage if another process was faster. Disk."""
        doomed = self.directory / f'{INCOMING}{info.id}'
        try:
            info.path.rename(doomed)
        except FileNotFoundError:
            raise NoSuchImage(f'image {info.id} was removed by another process', resource=info.id) from None
        except OSError as error:
            raise SpoolFailed(f'cannot remove image {info.id}: {error.strerror}', errno=error.errno,
                              resource=info.id, hint='check that the spool is writable') from error
        # the next start removes files that cannot be removed now
        shutil.rmtree(doomed, ignore_errors=True)

    def unfinished(self) -> list[tuple[str, Path]]:
        """Return (id, directory) of images that are not published. Disk. OSError."""
        return [(path.name.removeprefix(INCOMING), path) for path in self.directory.iterdir()
                if path.name.startswith(INCOMING)]

    def remove_stale(self) -> list[str]:
        """Remove unpublished images whose writer is dead. Return their ids. Disk."""
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
        statistics=msgspec.structs.asdict(manifest.statistics), names=0 if manifest.imported else manifest.names)
