# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image that a worker of an ordinary user writes. The broker takes it back and checks it before it is published."""

import os
import stat
from pathlib import Path

import msgspec

from ckptd import __version__
from ckptd.errors import ImageDamaged, SpoolFailed
from ckptd.image.files import spooling
from ckptd.image.manifest import NAME, Manifest, read_manifest_of
from ckptd.image.source import DirectoryFiles
from ckptd.image.writer import Incoming
from ckptd.kernel.task import boot_id
from ckptd.protocol.requests import CheckpointRequest, ImportRequest
from ckptd.worker.broker.identity import Identity


class UsersImage(Incoming):
    """A new image in a directory of the user below the spool, which only root can enter."""

    def __init__(self, spool: Path, image: str, identity: Identity) -> None:
        super().__init__(spool, image)
        self._identity = identity
        with spooling(self.path):
            os.fchown(self._lock, identity.uid, identity.gid)

    def duplicate(self) -> int:
        """Return an fd of the directory, for the worker."""
        return os.dup(self._lock)

    def take_back(self, request: CheckpointRequest | ImportRequest) -> None:
        """Give the files to root, check that they are an image and nothing else, and publish it. SpoolFailed."""
        with spooling(self.path):
            os.fchown(self._lock, 0, 0)         # from here on the worker can neither make nor rename anything
        files = DirectoryFiles(self.path)
        try:
            manifest = read_manifest_of(files)
            if surplus := sorted({*files.names()} - {NAME, *manifest.parts}):
                raise SpoolFailed(f'{surplus[0]} does not belong to the image', resource=surplus[0], phase='publish')
            for name in (NAME, *manifest.parts):
                self._take_back_file(files, name, manifest)
        except ImageDamaged as error:
            raise SpoolFailed(f'the image of the worker is incomplete: {error.message}', phase='publish') from error
        finally:
            files.close()
        with spooling(self.path / NAME):
            os.unlink(NAME, dir_fd=self._lock)
        manifest = msgspec.structs.replace(manifest, image=self.image, owner_uid=request.caller.uid,
                                           owner_gid=request.caller.gid, imported=isinstance(request, ImportRequest))
        if not manifest.imported:
            manifest = msgspec.structs.replace(manifest, ckptd_version=__version__, kernel=os.uname().release,
                                               boot_id=boot_id(), target=request.about)
        self.write_manifest(manifest)
        self.show()

    def _take_back_file(self, files: DirectoryFiles, name: str, manifest: Manifest) -> None:
        fd = files.open(name)
        try:
            with spooling(self.path / name):
                os.fchown(fd, 0, 0)
                os.fchmod(fd, 0o600)
                found = os.fstat(fd)
            if found.st_nlink != 1 or not stat.S_ISREG(found.st_mode):
                raise SpoolFailed(f'{name} has another hard link', resource=name, phase='publish')
            if name in manifest.parts and manifest.parts[name].size != found.st_size:
                raise SpoolFailed(f'{name} has {found.st_size} bytes, not {manifest.parts[name].size}', resource=name,
                                  phase='publish')
        finally:
            os.close(fd)
