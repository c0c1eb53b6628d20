# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl export: unpack a tar stream of cores that the daemon writes to a pipe.

Only the content of the stream is trusted. A member must be a regular file called core.N. It is created anew in the
given directory, never through a link.
"""

import asyncio
import contextlib
import functools
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ckptd.cli.archive import write_archive
from ckptd.cli.output import Column
from ckptd.cli.progress import ProgressBar
from ckptd.cli.quantities import format_bytes
from ckptd.cli.session import LONG, DaemonProxy, Session
from ckptd.errors import CkptError, ImageDamaged

COLUMNS = (Column('CORE', style='bold'), Column('SIZE', right=True))
CHUNK = 1 << 20
REASON_TIMEOUT = 5.0
_NAME = re.compile(r'(?:\./)?(core\.[0-9]{1,10})', re.ASCII)
_ZEROS = bytes(CHUNK)


async def export(session: Session) -> int:
    """Write the cores of an image to a directory."""
    args, out = session.args, session.out
    if args.format == 'tar':
        return await write_archive(session)
    directory = Path(args.directory)
    bar = ProgressBar(out, args.image)
    async with session.daemon() as daemon:
        with bar:
            cores = await export_to(daemon, args.image, directory, form=args.format, force=args.force,
                                    progress=lambda name, done: bar.update(name, 0.0, done))
    if out.json:
        out.document({'image': args.image, 'directory': str(directory),
                      'cores': [{'name': name, 'size': size} for name, size in cores]})
    out.table(COLUMNS, [[str(directory / name), format_bytes(size)] for name, size in cores],
              empty='The image has no process with memory.')
    return 0


async def export_to(daemon: DaemonProxy, image: str, directory: Path, *, form: str = 'core', force: bool = False,
                    progress: Callable[[str, int], None] = lambda name, done: None) -> list[tuple[str, int]]:
    """Return names and sizes of the written cores. If the export fails, all of them are removed."""
    made = await asyncio.to_thread(_make, directory)
    reader, writer = os.pipe()
    with os.fdopen(reader, 'rb') as stream:
        call = asyncio.ensure_future(_call(daemon, image, writer, form))
        unpack = asyncio.ensure_future(asyncio.to_thread(unpack_cores, stream, directory, force, progress))
        try:
            await asyncio.wait({call, unpack}, return_when=asyncio.FIRST_EXCEPTION)
            await _why(call, unpack)
            await call
            return await unpack
        except BaseException:
            call.cancel()
            with contextlib.suppress(CkptError, OSError, asyncio.CancelledError):
                for name, _ in await unpack:
                    (directory / name).unlink(missing_ok=True)
            for one in made:
                with contextlib.suppress(OSError):      # another process has put a file there
                    await asyncio.to_thread(one.rmdir)
            raise


def _make(directory: Path) -> list[Path]:
    """Make a directory and its missing parents. Return all that were made, the inner ones first."""
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


async def _why(call: 'asyncio.Future[None]', unpack: 'asyncio.Future[list[tuple[str, int]]]') -> None:
    """Raise the daemon's error rather than the local one: its failure looks like a stream cut short here."""
    if unpack.done() and isinstance(unpack.exception(), ImageDamaged):
        await asyncio.wait({call}, timeout=REASON_TIMEOUT)
    for done in (call, unpack):
        if done.done():
            done.result()


async def _call(daemon: DaemonProxy, image: str, writer: int, form: str) -> None:
    """Call Export and close our copy of the pipe. The stream ends when the daemon's copy is closed, too."""
    try:
        await daemon.image(image, 'Export', 'hsa{sv}', writer, form, {}, seconds=LONG)
    finally:
        os.close(writer)


def unpack_cores(stream: IO[bytes], directory: Path, force: bool,
                 progress: Callable[[str, int], None] = lambda name, done: None) -> list[tuple[str, int]]:
    """Write every core.N of a tar stream into the directory and return names and sizes. Runs in a thread. ImageDamaged
    if the stream is cut short or has any other member; the written files are then removed."""
    written: list[tuple[str, int]] = []
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with tarfile.open(fileobj=stream, mode='r|') as archive:
            for member in archive:
                name = _core_name(member)
                with _create(handle, directory, name, force) as out:
                    written.append((name, member.size))
                    _copy(archive.extractfile(member), out, functools.partial(progress, name))
    except (tarfile.TarError, EOFError) as error:
        _unlink(handle, written)
        raise ImageDamaged(f'the exported stream is cut short: {error}', hint='') from error
    except BaseException:
        _unlink(handle, written)
        raise
    finally:
        os.close(handle)
    return written


def _core_name(member: tarfile.TarInfo) -> str:
    match = _NAME.fullmatch(member.name)
    if match is None or not member.isreg():
        raise ImageDamaged(f'the exported stream has {member.name!r}, which is not a core', hint='')
    return match[1]


def _unlink(handle: int, written: list[tuple[str, int]]) -> None:
    for name, _ in written:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=handle)


def _create(handle: int, directory: Path, name: str, force: bool) -> IO[bytes]:
    """Create a file. With force, it replaces an existing one of any type."""
    if force:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=handle)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.fdopen(os.open(name, flags, 0o600, dir_fd=handle), 'wb')
    except FileExistsError as error:
        raise CkptError(f'{directory / name} exists already', errno=error.errno,
                        hint='use --force to overwrite it, or choose another directory') from error


def _copy(content: IO[bytes] | None, out: IO[bytes], progress: Callable[[int], None]) -> None:
    """Copy the content and turn zeros into holes, since most of a core is memory that was never touched."""
    assert content is not None      # true for a regular member
    done = 0
    while chunk := content.read(CHUNK):
        if chunk == _ZEROS[:len(chunk)]:
            out.seek(len(chunk), os.SEEK_CUR)
        else:
            out.write(chunk)
        done += len(chunk)
        progress(done)
    out.truncate(done)
