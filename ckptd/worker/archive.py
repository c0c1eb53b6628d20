# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations export and import: an image as a stream, to or from an fd of the caller, which may stall for ever.

    receive -> verify -> publish     an import; cancelled or failed before the image exists, it leaves nothing
"""

import os
import stat
from contextlib import nullcontext

from ckptd.errors import InvalidArgument
from ckptd.faults import fault
from ckptd.image.archive.pack import write_archive
from ckptd.image.archive.unpack import read_archive
from ckptd.image.cores.export import export
from ckptd.image.reader import ImageReader
from ckptd.image.source import ImageFiles
from ckptd.kernel.creds import CAP_DAC_READ_SEARCH, become, no_capabilities
from ckptd.operation.context import JobContext
from ckptd.protocol.requests import ExportRequest, ImportRequest

_FAULTS = {'verify': 'received', 'publish': 'verified'}      # fault points just before a phase


def export_image(job: JobContext[ExportRequest]) -> None:
    """Export an image as a tar stream: of cores, one per process, or of the image itself."""
    rights = job.request.writer or job.request.caller
    with job.image_files() as files:
        if rights.uid != os.geteuid():
            # For some files (/proc, netlink(7)) the writer's rights decide about a write. The fd is the caller's, so of
            # root's rights only that to read the image is kept.
            become(rights.uid, rights.gid, rights.groups, 1 << CAP_DAC_READ_SEARCH)
        with job.channel.interrupting(job.request.stall_usec / 1e6):
            names = (write_archive(files, job.fd) if job.request.format == 'tar'
                     else _export_cores(files, job.fd))
    job.channel.finish('files', names)


def _export_cores(files: ImageFiles, output: int) -> list[str]:
    # the only right of root that is kept is to read the image; other files are opened without any of its capabilities
    outside = no_capabilities if os.geteuid() else nullcontext
    with ImageReader(files, outside) as reader, os.fdopen(os.dup(output), 'wb', buffering=0) as sink:
        return export(reader, sink)


class _Watcher:
    """A listener that reports the progress of an import to the daemon, and stops it when the daemon cancels."""

    def __init__(self, job: JobContext[ImportRequest]) -> None:
        self._channel, self._stall = job.channel, job.request.stall_usec / 1e6

    def wait_readable(self, fd: int) -> None:
        self._channel.wait_readable(fd, self._stall)

    def phase(self, name: str) -> None:
        if point := _FAULTS.get(name):
            fault(point)
        self._channel.phase(name)

    def progress(self, done: int, total: int) -> None:
        self._channel.progress(0, 0, done, total)


def import_image(job: JobContext[ImportRequest]) -> None:
    """Import an image from a tar stream into the spool. Its owner is the caller."""
    request = job.request
    # other files, such as a pidfd, may never become readable
    if job.fd < 0 or not any(kind(os.fstat(job.fd).st_mode) for kind in (stat.S_ISREG, stat.S_ISFIFO,
                                                                                stat.S_ISSOCK)):
        raise InvalidArgument('the input is not a stream', hint='give the fd of a pipe, a socket or a file')
    manifest = read_archive(job.fd, job.import_destination, request.caller.uid, request.caller.gid,
                            request.size_limit, _Watcher(job), request.keep_free)
    job.channel.finish('', (), {'image': manifest.image, 'bytes': manifest.size})
