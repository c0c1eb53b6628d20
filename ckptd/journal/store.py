# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory of entries: make, list and claim them."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ckptd import flock
from ckptd.journal.entry import (
    MAX_ENTRY,
    SUFFIX,
    VERSION,
    Begin,
    Contents,
    JournalEntry,
    journal_failed,
    parse_entry,
)
from ckptd.journal.steps import AnyStep
from ckptd.kernel.procfs import read_file
from ckptd.kernel.task import boot_id

MAX_ENTRIES = 4096


class Listing(NamedTuple):
    """An entry as other processes see it. alive: its owner lives."""
    name: str
    alive: bool
    begin: Begin
    steps: tuple[AnyStep, ...]


class Journal:
    """All freezes of one runtime directory. Daemon and workers each have their own object of it."""

    def __init__(self, runtime: Path) -> None:
        self.directory = runtime / 'freezes'

    def begin(self, job: int, target: str, mode: str) -> JournalEntry:
        """Make an entry that this process owns."""
        begin = Begin(VERSION, boot_id(), job, target[:4096], mode)
        try:
            with self._locked() as directory:
                path = self.directory / f'{job}-{secrets.token_hex(4)}{SUFFIX}'
                fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                entry = JournalEntry(path, fd, Contents(begin, [], set(), 0))
                flock.lock(fd, wait=False)
                entry.append(begin)
                os.fsync(directory)
                return entry
        except OSError as error:
            raise journal_failed(self.directory, error) from error

    def path(self, entry: Listing) -> Path:
        """Return the file of an entry."""
        return self.directory / f'{entry.name}{SUFFIX}'

    def entries(self) -> list[Listing]:
        """List the entries by name. Other files are left out."""
        found: list[Listing] = []
        with self._locked():
            for path in self._paths():
                alive = False
                try:
                    fd, alive = _open(path)
                    try:
                        contents = parse_entry(os.pread(fd, MAX_ENTRY, 0))
                    finally:
                        flock.close(fd)
                except (OSError, ValueError):
                    continue
                entry = JournalEntry(path, -1, contents)
                found.append(Listing(entry.name, alive, entry.begin, tuple(step for _, step in entry.standing())[::-1]))
        return found

    def claim(self) -> Iterator[JournalEntry | tuple[Path, str]]:
        """Claim the entries without an owner for this process. For a file that is not an entry, yield its path and the
        reason."""
        with self._locked():
            claimed = [found for path in self._paths() if (found := _claim(path)) is not None]
        yield from claimed

    def _paths(self) -> list[Path]:
        found = sorted(path for path in self.directory.iterdir() if path.name.endswith(SUFFIX))
        return found[:MAX_ENTRIES]

    @contextmanager
    def _locked(self) -> Iterator[int]:
        # the mode applies to the last directory only: parents get theirs from the umask
        self.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            facts = os.fstat(fd)
            if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
                raise PermissionError(errno.EPERM, 'it must be ours, and not writable by other users')
            flock.lock(fd)
            yield fd
        finally:
            flock.close(fd)


def _open(path: Path) -> tuple[int, bool]:
    """Return the fd of an entry and whether another process holds it. If none does, the fd has the lock now. OSError if
    it is not an entry."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_size > MAX_ENTRY:
            raise OSError(errno.EBADMSG, 'not a regular file of ours of at most 32 MiB')
        try:
            flock.lock(fd, wait=False)
        except BlockingIOError:
            return fd, True
        # its owner may have deleted it between open and flock
        if os.fstat(fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        flock.close(fd)
        raise
    return fd, False


def _claim(path: Path) -> JournalEntry | tuple[Path, str] | None:
    """Claim one entry. None if it has an owner or is gone."""
    try:
        fd, alive = _open(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return path, error.strerror or str(error)
    try:
        if alive:
            flock.close(fd)
            return None
        return JournalEntry(path, fd, parse_entry(read_file(str(path))))
    except ValueError as error:
        flock.close(fd)
        return path, str(error)
