# SPDX-License-Identifier: LGPL-2.1-or-later
"""What images may take of the spool: those of each user, and all of them. What is being written counts. Root has no
limit."""

from collections.abc import Iterable

from ckptd.config import Config, Percent
from ckptd.errors import LimitsExceeded
from ckptd.jobs.spool import Spool
from ckptd.jobs.state import JobRecord

WRITING = frozenset({'checkpoint', 'import'})
MOST = (1 << 63) - 1        # bytes


class Quota:
    """Of one spool."""

    def __init__(self, config: Config, spool: Spool) -> None:
        self._config, self._spool = config, spool
        self._writing: set[JobRecord] = set()

    def begin(self, job: JobRecord) -> None:
        """From now on what it writes counts. Of a job that writes no image: nothing."""
        if job.request.operation in WRITING:
            self._writing.add(job)

    def end(self, job: JobRecord) -> None:
        """It has published its image, or will never."""
        self._writing.discard(job)

    def room(self, uid: int) -> int:
        """Bytes that a user may still have in images. LimitsExceeded when there may be no more."""
        if not uid:
            return MOST
        images, size = self._usage(uid)
        in_all, bytes_in_all = self._usage(None)
        most, most_in_all = self._bytes(self._config.max_bytes_per_user), self._bytes(self._config.max_bytes)
        if in_all >= self._config.max_images or bytes_in_all >= most_in_all:
            raise LimitsExceeded(f'the spool has {in_all} images of {bytes_in_all:,} bytes, and takes no more',
                                 resource='spool', hint='remove some (ckptctl remove IMAGE), or ask root to')
        if images >= self._config.max_images_per_user or size >= most:
            allowed = '' if most >= MOST else f' and {most:,} bytes'
            raise LimitsExceeded(
                f'uid {uid} has {images} images of {size:,} bytes; {self._config.max_images_per_user}{allowed} are '
                'allowed', resource='spool', hint='remove some (ckptctl remove IMAGE)')
        return min(most - size, most_in_all - bytes_in_all, MOST)

    def keep_free(self, uid: int) -> int:
        """Bytes of the file system that have to stay free when this user writes."""
        return self._bytes(self._config.keep_free) if uid else 0

    def check(self, job: JobRecord) -> None:
        """LimitsExceeded when it writes more than there is room for."""
        uid = job.request.caller.uid
        if not uid or job not in self._writing:
            return
        for whose, name, most in ((uid, f'uid {uid}', self._config.max_bytes_per_user),
                                  (None, 'the spool', self._config.max_bytes)):
            size = self._usage(whose)[1]
            if size > self._bytes(most):
                raise LimitsExceeded(f'with image {job.request.image} {name} would have {size:,} bytes of images; '
                                     f'{self._bytes(most):,} are allowed', resource='spool',
                                     hint='remove images (ckptctl remove IMAGE); nothing was left of this one')

    def _usage(self, uid: int | None) -> tuple[int, int]:
        """Images and bytes that a uid has or is about to have, or all."""
        images, size = self._spool.usage(uid)
        sizes = [_size(job) for job in self._of(uid)]
        return images + len(sizes), size + sum(sizes)

    def _of(self, uid: int | None) -> Iterable[JobRecord]:
        return (job for job in self._writing if uid in (None, job.request.caller.uid))

    def _bytes(self, limit: int) -> int:
        return self._spool.capacity * limit // 100 if isinstance(limit, Percent) else limit


def _size(job: JobRecord) -> int:
    """As far as it is known."""
    return max(job.counts.bytes_total, job.counts.bytes_done)
