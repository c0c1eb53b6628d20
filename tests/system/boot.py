# SPDX-License-Identifier: LGPL-2.1-or-later
"""First process of a throw-away machine: builds its file system, then becomes systemd. Run by container.py as

    unshare --mount --uts --ipc --pid --net --fork ... -- python -m tests.system.boot SPEC

    /                   overlay: lower is the running system's /, upper a tmpfs that dies with the machine
    /proc /sys /dev     its own; /sys and the sysctls read-only, or it would change the host's
    /sys/fs/cgroup      cgroup2, and nothing else, rooted at SPEC's cgroup
    /run /tmp /dev/shm  tmpfs
    /run/host/notify    the socket that systemd tells READY=1 when the boot is over (container interface of systemd)

What the host has enabled stays behind: no .wants or .requires directory is carried over, so the machine starts the
few units of TARGET and what they need, whatever is installed on the host.
"""

import ctypes
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWCGROUP = 0x02000000    # <linux/sched.h>
SYSTEMD = '/lib/systemd/systemd'
# kmsg is a null device: the host's kernel log stays the host's. A link to null would not do: ProtectKernelLogs= covers
# what it leads to.
DEVICES = {'kmsg': '/dev/null', 'null': '/dev/null', 'zero': '/dev/zero', 'full': '/dev/full',
           'random': '/dev/random', 'urandom': '/dev/urandom', 'tty': '/dev/tty'}
TARGET = """[Unit]
Description=A machine to test on
Requires=basic.target
Wants=systemd-journald.service dbus.socket dbus.service
After=basic.target systemd-journald.service dbus.service
"""
JOURNAL = '[Journal]\nStorage=volatile\nRuntimeMaxUse=32M\nReadKMsg=no\nAudit=no\n'
# stopping what is frozen or held must not keep a test waiting for a minute and a half
MANAGER = '[Manager]\nDefaultTimeoutStopSec=10s\nDefaultTimeoutStartSec=30s\n'


@dataclass(frozen=True)
class Spec:
    """cgroup: directory that becomes the machine's root cgroup. stage: a tree copied over /. files: path -> text.

    binds: directories of the host to be seen at the same path (the overlay shows one file system only)."""
    name: str
    cgroup: str
    notify: str
    stage: str
    files: dict[str, str]
    binds: list[str]


def mount(kind: str, target: Path, options: str = '', source: str | None = None) -> None:
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(['mount', '-t', kind, *(['-o', options] if options else []), source or kind, target], check=True)


def bind(source: Path, target: Path) -> None:
    """A bind mount of a directory or a file, the target made if need be."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    subprocess.run(['mount', '--rbind', source, target], check=True)


def enter_cgroup(path: str) -> None:
    """Join, then unshare: the cgroup of the moment becomes the root of the new namespace (cgroup_namespaces(7))."""
    (Path(path) / 'cgroup.procs').write_text('0')
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWCGROUP):
        raise OSError(ctypes.get_errno(), 'unshare(CLONE_NEWCGROUP)')


def make_root(base: Path, stage: str) -> Path:
    """The overlay. Its upper is on a tmpfs of its own: an upper below its own lower is refused by overlayfs."""
    mount('tmpfs', base, 'mode=755')
    for name in ('upper', 'work', 'root'):
        (base / name).mkdir()
    if stage:
        shutil.copytree(stage, base / 'upper', symlinks=True, dirs_exist_ok=True)
        (base / 'upper').chmod(0o755)
    mount('overlay', base / 'root', f'lowerdir=/,upperdir={base}/upper,workdir={base}/work')
    return base / 'root'


def mount_kernel_file_systems(root: Path) -> None:
    mount('proc', root / 'proc', 'nosuid,nodev,noexec')
    for read_only in ('proc/sys', 'proc/sysrq-trigger'):
        if (root / read_only).exists():
            bind(root / read_only, root / read_only)
            subprocess.run(['mount', '-o', 'remount,bind,ro', root / read_only], check=True)
    mount('sysfs', root / 'sys', 'nosuid,nodev,noexec,ro')
    mount('cgroup2', root / 'sys/fs/cgroup', 'nosuid,nodev,noexec')


def mount_devices(root: Path) -> None:
    dev = root / 'dev'
    mount('tmpfs', dev, 'nosuid,mode=755')
    for name, host in DEVICES.items():
        # made, not bound: the name space of a sandboxed service shows what lies below a bound node
        os.mknod(dev / name, 0o666 | stat.S_IFCHR, Path(host).stat().st_rdev)
        (dev / name).chmod(0o666)
    for name, target in {'fd': '/proc/self/fd', 'stdin': 'fd/0', 'stdout': 'fd/1', 'stderr': 'fd/2',
                         'ptmx': 'pts/ptmx'}.items():
        (dev / name).symlink_to(target)
    mount('devpts', dev / 'pts', 'newinstance,nosuid,noexec,mode=620,ptmxmode=666')
    mount('tmpfs', dev / 'shm', 'nosuid,nodev,mode=1777')


def forget_enabled_units(root: Path) -> None:
    for directory in ('etc/systemd/system', 'usr/lib/systemd/system', 'lib/systemd/system', 'run/systemd/system'):
        for pattern in ('*.wants', '*.requires', '*.upholds'):
            for path in (root / directory).glob(pattern):
                shutil.rmtree(path)


def write_files(root: Path, spec: Spec) -> None:
    files = {
        '/etc/systemd/system/machine.target': TARGET,
        '/etc/systemd/journald.conf.d/50-machine.conf': JOURNAL,
        '/etc/systemd/system.conf.d/50-machine.conf': MANAGER,
        '/etc/fstab': '', '/etc/hostname': f'{spec.name}\n',
        '/etc/machine-id': f'{os.urandom(16).hex()}\n', **spec.files,
    }
    for name, text in files.items():
        path = root / name.lstrip('/')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)


def become_systemd(root: Path) -> None:
    os.chdir(root)
    Path('old').mkdir()
    subprocess.run(['pivot_root', '.', 'old'], check=True)
    # pivot_root(8) moved us too; what is left of the old root goes with its last user
    subprocess.run(['umount', '-l', '/old'], check=True)
    Path('/old').rmdir()
    os.chdir('/')
    # as a host's PID 1 would have it: propagation into the name spaces of sandboxed services
    subprocess.run(['mount', '--make-rshared', '/'], check=True)
    os.execve(SYSTEMD, [SYSTEMD, '--system', '--unit=machine.target', '--show-status=no', '--log-target=console'],
              {'container': 'ckptd-tests', 'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
               'LANG': 'C.UTF-8', 'NOTIFY_SOCKET': '/run/host/notify'})


def main() -> None:
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    enter_cgroup(spec.cgroup)
    subprocess.run(['mount', '--make-rprivate', '/'], check=True)
    root = make_root(Path(sys.argv[1]).with_suffix('.mnt'), spec.stage)
    mount_kernel_file_systems(root)
    mount_devices(root)
    mount('tmpfs', root / 'run', 'nosuid,nodev,mode=755')
    mount('tmpfs', root / 'tmp', 'nosuid,nodev,mode=1777')
    for path in spec.binds:
        bind(Path(path), root / path.lstrip('/'))
    bind(Path(spec.notify), root / 'run/host/notify')
    forget_enabled_units(root)
    write_files(root, spec)
    socket.sethostname(spec.name)
    become_systemd(root)


if __name__ == '__main__':
    main()
