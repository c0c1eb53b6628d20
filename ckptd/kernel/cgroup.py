# SPDX-License-Identifier: LGPL-2.1-or-later
"""cgroup v2: the mount and the files of a cgroup directory (the kernel's admin-guide/cgroup-v2.rst)."""

import errno
import os
import select
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ckptd.kernel.mountinfo import Mount, read_mountinfo
from ckptd.kernel.procfs import read_file
from ckptd.kernel.task import read_cgroup2


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """A mounted v2 hierarchy, alone ('pure') or beside v1 controllers ('hybrid'). root: the cgroup at `path`."""
    path: Path
    root: str

    def directory(self, cgroup: str) -> Path:
        """Return the directory of a cgroup by its path in /proc/PID/cgroup. FileNotFoundError if this mount does not
        show it."""
        path, root = PurePosixPath(cgroup), PurePosixPath(self.root)
        below = path.relative_to(root) if path.is_relative_to(root) else None
        # '/../x' is beside the root of our cgroup namespace (cgroup_namespaces(7)), not above the mount point
        if below is None or '..' in below.parts:
            raise FileNotFoundError(errno.ENOENT, f'not below the mounted cgroup {self.root}', cgroup)
        return self.path / below


def mount_of(mounts: Iterable[Mount]) -> CgroupMount | None:
    """Return the v2 hierarchy among the mounts. If there are several, return the mount that shows most of it."""
    found = [CgroupMount(Path(mount.mount_point), mount.root) for mount in mounts if mount.fs_type == 'cgroup2']
    return min(found, key=lambda mount: len(mount.root), default=None)


def find_mount() -> CgroupMount:
    """Return the v2 hierarchy of this mount namespace. FileNotFoundError if there is none."""
    mount = mount_of(read_mountinfo())
    if mount is None:
        raise FileNotFoundError(errno.ENOENT, 'no cgroup v2 hierarchy is mounted')
    return mount


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup, by its directory. Methods raise FileNotFoundError or OSError ENODEV once it is removed.

    The root cgroup has no cgroup.freeze, cgroup.events and cgroup.kill. It is never frozen and cannot be.
    """
    path: Path

    @classmethod
    def of(cls, pid: int) -> 'Cgroup':
        """Return the cgroup of a process. For a threaded one it is the leader's."""
        return cls(find_mount().directory(read_cgroup2(pid) or '/'))

    @classmethod
    def named(cls, name: str) -> 'Cgroup':
        """Return the cgroup with this path below the mount, such as '/system.slice/x.service'. It need not exist."""
        return cls(find_mount().path / name.lstrip('/'))

    @property
    def name(self) -> str:
        """Path below the mount, '/' for the mount itself."""
        relative = self.path.relative_to(find_mount().path).as_posix()
        return '/' if relative == '.' else f'/{relative}'

    @property
    def parent(self) -> 'Cgroup | None':
        """The cgroup above; None for the topmost one of the mount."""
        above = Cgroup(self.path.parent)
        return above if (above.path / 'cgroup.procs').exists() else None

    def children(self) -> list['Cgroup']:
        """Return the cgroups directly below."""
        return [Cgroup(entry) for entry in sorted(self.path.iterdir()) if entry.is_dir()]

    def walk(self) -> Iterator['Cgroup']:
        """Yield this cgroup and all below, parents first. A cgroup that is removed meanwhile is left out."""
        yield self
        try:
            below = self.children()
        except FileNotFoundError:
            return
        for child in below:
            yield from child.walk()

    def procs(self, recursive: bool = False) -> list[int]:
        """Return the pids in ascending order: in this cgroup, or in all below it as well. No cgroup.procs file lists
        zombies."""
        return self._members('cgroup.procs', recursive)

    def threads(self, recursive: bool = False) -> list[int]:
        """Return the thread ids in ascending order: in this cgroup, or in all below it as well."""
        return self._members('cgroup.threads', recursive)

    def _members(self, file: str, recursive: bool) -> list[int]:
        found = set(self._numbers(file))
        if recursive:
            for group in self.walk():
                try:
                    found.update(group._numbers(file))
                except OSError as error:
                    # removed meanwhile; or threaded, and then its processes are in the cgroup.procs of its domain
                    if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                        raise
        return sorted(found)

    def _numbers(self, file: str) -> list[int]:
        return [int(number) for number in read_file(f'{self.path}/{file}').split()]

    @property
    def exists(self) -> bool:
        """Whether the cgroup exists. A name from an image may be too long for a path, and then no cgroup has it."""
        try:
            return self.path.is_dir()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return False

    @property
    def frozen_wanted(self) -> bool:
        """Whether 1 was last written to cgroup.freeze of this cgroup itself."""
        try:
            return read_file(f'{self.path}/cgroup.freeze').strip() == b'1'
        except FileNotFoundError:
            return self._absent()

    @property
    def frozen(self) -> bool:
        """Whether every task in it and below is frozen, by its own cgroup.freeze or by one above (cgroup.events)."""
        try:
            return _is_set(read_file(f'{self.path}/cgroup.events'), b'frozen')
        except FileNotFoundError:
            return self._absent()

    @property
    def type(self) -> str:
        """'domain', 'threaded', 'domain threaded' or 'domain invalid'. A process moves as a whole only between
        domains."""
        try:
            return read_file(f'{self.path}/cgroup.type').decode().strip()
        except FileNotFoundError:
            self._absent()
            return 'domain'

    def _absent(self) -> bool:
        # The root cgroup lacks these files. Any other cgroup that lacks them was removed.
        if not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        return False

    def freeze(self) -> None:
        """Request a freeze. `wait` reports its completion."""
        self._write('cgroup.freeze', '1')

    def thaw(self) -> None:
        """Request a thaw. A cgroup above may keep the tasks frozen."""
        self._write('cgroup.freeze', '0')

    def wait(self, frozen: bool, deadline_monotonic: float, also: int | None = None) -> bool:
        """Wait until cgroup.events reports `frozen`. Return False if the deadline (time.monotonic()) passed or the fd
        `also` became readable first."""
        return self._wait(b'frozen', frozen, deadline_monotonic, also)

    def wait_empty(self, deadline_monotonic: float) -> bool:
        """Wait until no live process is in it or below. Return False if the deadline passed first."""
        return self._wait(b'populated', False, deadline_monotonic, None)

    def _wait(self, key: bytes, wanted: bool, deadline_monotonic: float, also: int | None) -> bool:
        fd = os.open(self.path / 'cgroup.events', os.O_RDONLY | os.O_CLOEXEC)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            if also is not None:
                poll.register(also, select.POLLIN)
            # kernfs reports changes since the last read. Reading first and polling then misses none.
            while _is_set(os.pread(fd, 4096, 0), key) != wanted:
                left = deadline_monotonic - time.monotonic()
                events = poll.poll(left * 1000) if left > 0 else []
                if not events or any(ready == also for ready, _ in events):
                    return _is_set(os.pread(fd, 4096, 0), key) == wanted
            return True
        finally:
            os.close(fd)

    def create(self, name: str) -> 'Cgroup':
        """Make a cgroup below this one. FileExistsError if there is one."""
        child = self.path / name
        child.mkdir(mode=0o755)
        return Cgroup(child)

    def attach(self, pid: int) -> None:
        """Move a process here with all its threads. It then becomes frozen or thawed like this cgroup."""
        self._write('cgroup.procs', str(pid))

    def remove(self) -> None:
        """Remove the cgroup. OSError EBUSY while it contains a live process or a cgroup."""
        self.path.rmdir()

    def kill(self) -> None:
        """Send SIGKILL to all tasks in it and below, frozen or not; since 5.14."""
        self._write('cgroup.kill', '1')

    def writable(self) -> bool:
        """Whether the caller may move processes here and make cgroups below. A delegation boundary may still forbid a
        move."""
        return os.access(self.path, os.W_OK) and os.access(self.path / 'cgroup.procs', os.W_OK)

    def _write(self, file: str, value: str) -> None:
        # one write(2): the kernel treats each as a separate command
        fd = os.open(self.path / file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)


def _is_set(events: bytes, key: bytes) -> bool:
    return b'\n%s 1' % key in b'\n' + events
