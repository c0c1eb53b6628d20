# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check the digests of an image's data in a thread while the tree is made. The tree runs only if they match."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

from ckptd.errors import Cancelled, ImageDamaged
from ckptd.image.source import ImageFiles
from ckptd.image.verify import verify_data


def damaged(damages: list[str]) -> ImageDamaged:
    """Return the error for these damages, of which there is at least one."""
    more = f' (and {len(damages) - 1} more)' if len(damages) > 1 else ''
    return ImageDamaged(f'{damages[0]}{more}')


class Digests:
    """A check of digests: `with Digests(path) as digests: ...; digests.require()`. A block that ends early does not
    wait for it."""

    def __init__(self, image: Path | ImageFiles) -> None:
        self._given_up, self._image = False, image
        self._pool = ThreadPoolExecutor(1, 'digests')
        self._damages: Future[list[str]] | None = None
        with suppress(RuntimeError):        # no thread can be started: RLIMIT_NPROC of the user
            self._damages = self._pool.submit(verify_data, image, self._on_bytes)

    def _on_bytes(self, count: int) -> None:
        if self._given_up:
            raise Cancelled('the result is no longer needed')

    def require(self) -> None:
        """Wait for the result. ImageDamaged if a digest does not match."""
        found = self._damages.result() if self._damages is not None else verify_data(self._image, self._on_bytes)
        if found:
            raise damaged(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up = True
        self._pool.shutdown(wait=True)
