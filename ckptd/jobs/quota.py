# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits on the space of images in the spool: for each user, and for all together. Images that are being written count.
Root has no limit."""

from collections.abc import Iterable

from ckptd.config import Config, Percent
from ckptd.errors import LimitsExceeded
from ckptd.jobs.spool import Spool
from ckptd.jobs.state import JobRecord

WRITING = frozenset({'checkpoint', 'import'})
MOST = (1 << 63) - 1        # bytes


class Quota:
    """The quota of one spool."""

    def __init__(self, config: Config, spool: Spool) -> None:
        self._config, self._spool = config, spool
        self._writing: set[JobRecord] = set()

    def begin(self, job: JobRecord) -> None:
        """Count what this job writes from now on. A job that writes no image is ignored."""
        if job.request.operation in WRITING:
            self._writing.add(job)

    def end(self, job: JobRecord) -> None:
        """Stop counting the job: it has published its image, or never will."""
        self._writing.discard(job)

    def room(self, uid: int) -> int:
        """Return the bytes that a user may still use for images. LimitsExceeded if there is no room for another
        image."""
        if not uid:
            return MOST
        images, size = self._usage(uid)
        in_all, bytes_in_all = self._usage(None)
        most, most_in_all = self._bytes(self._config.max_bytes_per_user), self._bytes(self._config.max_bytes)
        if in_all >= self._config.max_images or bytes_in_all >= most_in_all:
            raise LimitsExceeded(f'the spool is full: it has {in_all} images of {bytes_in_all:,} bytes',
                                 resource='spool', hint='remove some (ckptctl remove IMAGE), or ask root to')
        if images >= self._config.max_images_per_user or size >= most:
            allowed = '' if most >= MOST else f' and {most:,} bytes'
            raise LimitsExceeded(
                f'uid {uid} has {images} images of {size:,} bytes; {self._config.max_images_per_user}{allowed} are '
                'allowed', resource='spool', hint='remove some (ckptctl remove IMAGE)')
        return min(most - size, most_in_all - bytes_in_all, MOST)

    def keep_free(self, uid: int) -> int:
        """Return the bytes of the file system that must stay free when this user writes."""
        return self._bytes(self._config.keep_free) if uid else 0

    def check(self, job: JobRecord) -> None:
        """Check that the job does not write more than there is room for. LimitsExceeded."""
        uid = job.request.caller.uid
        if not uid or job not in self._writing:
            return
        for whose, name, most in ((uid, f'uid {uid}', self._config.max_bytes_per_user),
                                  (None, 'the spool', self._config.max_bytes)):
            size = self._usage(whose)[1]
            if size > self._bytes(most):
                raise LimitsExceeded(f'with image {job.request.image_id} {name} would have {size:,} bytes of images; '
                                     f'{self._bytes(most):,} are allowed', resource='spool',
                                     hint='remove images (ckptctl remove IMAGE); nothing was left of this one')

    def _usage(self, uid: int | None) -> tuple[int, int]:
        """Return (images, bytes) that a uid, or all users, have or are about to have."""
        images, size = self._spool.usage(uid)
        sizes = [_size(job) for job in self._of(uid)]
        return images + len(sizes), size + sum(sizes)

    def _of(self, uid: int | None) -> Iterable[JobRecord]:
        return (job for job in self._writing if uid in (None, job.request.caller.uid))

    def _bytes(self, limit: int) -> int:
        return self._spool.capacity * limit // 100 if isinstance(limit, Percent) else limit


def _size(job: JobRecord) -> int:
    """Return the size, as far as it is known."""
    return max(job.counts.bytes_total, job.counts.bytes_done)
