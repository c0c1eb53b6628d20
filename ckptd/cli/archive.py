# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl export --format tar, and ckptctl import: images as files, to store or to take to another machine."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptd.cli.session import LONG, Session
from ckptd.errors import CkptError, InvalidArgument

STDIO = '-'


async def write_archive(session: Session) -> int:
    """Write an image to a file or, for '-', to standard output. If this fails, the file is removed."""
    args, out = session.args, session.out
    async with session.daemon() as daemon:
        with _written(args.directory, args.force) as fd:
            await daemon.image(args.image, 'Export', 'hsa{sv}', fd, 'tar', {}, seconds=LONG)
    if args.directory != STDIO:
        out.document({'image': args.image, 'file': args.directory}) if out.json else out.line(args.directory)
    return 0


async def import_(session: Session) -> int:
    """Import an image and print its id."""
    args, out = session.args, session.out
    async with session.daemon() as daemon:
        with _read(args.file) as fd:
            path = await daemon.manager('Import', 'ha{sv}', fd, {}, seconds=LONG)
    image = str(path).rpartition('/')[2]
    out.document({'image': image}) if out.json else out.line(image)
    return 0


@contextmanager
def _written(name: str, force: bool) -> Iterator[int]:
    if name == STDIO:
        if sys.stdout.isatty():
            raise InvalidArgument('an image cannot be written to a terminal', hint='give a file, or use a pipe')
        yield 1
        return
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL), 0o600)
    except FileExistsError as error:
        raise CkptError(f'{name} exists already', errno=error.errno, hint='use --force to overwrite it') from error
    try:
        yield fd
    except BaseException:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    finally:
        os.close(fd)


@contextmanager
def _read(name: str) -> Iterator[int]:
    if name == STDIO:
        if sys.stdin.isatty():
            raise InvalidArgument('an image cannot be read from a terminal', hint='give a file')
        yield 0
        return
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
