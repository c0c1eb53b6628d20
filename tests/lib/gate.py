# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test needs of the machine, and the command that brings it.

A test says `@pytest.mark.needs('root', 'gdb')`. What is missing skips it with the reason and the remedy;
CKPTD_REQUIRE=root,gdb (or all) turns that skip into a failure, so a gap in CI cannot pass for success.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PTRACE_SEIZE = 0x4206       # <linux/ptrace.h>
# <asm/unistd_64.h>, <linux/keyctl.h>
NR_KEYCTL, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING = 250, 0, -3


@dataclass(frozen=True)
class Need:
    """missing() is a sentence when the thing is not there, else ''. fix is the command that brings it. heavy: only
    tests with the marker `heavy` need it."""
    missing: Callable[[], str]
    fix: str
    heavy: bool = False


def _program(*names: str) -> Callable[[], str]:
    def missing() -> str:
        absent = [name for name in names if shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/sbin') is None]
        return f'no {" and no ".join(absent)} on PATH' if absent else ''
    return missing


def _file(*paths: str) -> Callable[[], str]:
    return lambda: '' if any(Path(path).exists() for path in paths) else f'no {paths[0]}'


def _fuse() -> str:
    known = '\tfuse\n' in Path('/proc/filesystems').read_text()
    return _file('/dev/fuse')() if known else 'no fuse in /proc/filesystems'


def _root() -> str:
    return '' if os.geteuid() == 0 else f'running as uid {os.geteuid()}, not as root'


def cgroup2_mount() -> Path | None:
    """Where cgroup2 is mounted, read apart from ckptd's own code; the first one wins."""
    for line in Path('/proc/self/mountinfo').read_text().splitlines():
        left, _, right = line.partition(' - ')
        if right.split()[0] == 'cgroup2':
            return Path(left.split()[4])
    return None


def own_cgroup() -> Path | None:
    """The directory of this process's cgroup2, None where there is no mount of it."""
    mount = cgroup2_mount()
    for line in Path('/proc/self/cgroup').read_text().splitlines():
        if mount is not None and line.startswith('0::'):
            return mount / line[3:].lstrip('/')
    return None


def cgroup1_mount() -> Path | None:
    """Where the hierarchy of version 1 is mounted that limits memory, or the number of tasks."""
    for line in Path('/proc/self/mountinfo').read_text().splitlines():
        left, _, right = line.partition(' - ')
        kind, _, options = right.split()
        if kind == 'cgroup' and {'memory', 'pids'} & set(options.split(',')):
            return Path(left.split()[4])
    return None


def _cgroup2() -> str:
    own = own_cgroup()
    if own is None:
        return 'no cgroup2 is mounted'
    probe = own / f'probe-{os.getpid()}'
    try:
        probe.mkdir()
    except OSError as error:
        return f'cannot make a cgroup: {error}'
    try:
        return '' if (probe / 'cgroup.freeze').exists() else f'{probe} has no cgroup.freeze'
    finally:
        probe.rmdir()


def _sysctl(name: str) -> Callable[[], str]:
    """Whether a number is there that limits ordinary users, and is not 0."""
    def missing() -> str:
        path = Path('/proc/sys', name.replace('.', '/'))
        return '' if path.exists() and int(path.read_text()) else f'no {name}, or it is 0'
    return missing


def _set_user_id() -> str:
    """Whether programs with set-user-ID get their owner's rights where tests put them."""
    place = tempfile.gettempdir()
    return f'{place} is mounted with nosuid' if os.statvfs(place).f_flag & os.ST_NOSUID else ''


def _ptrace() -> str:
    """PTRACE_SEIZE of an own child: Yama, seccomp or a missing CAP_SYS_PTRACE may forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        result = libc.ptrace(PTRACE_SEIZE, child, None, None)
        return '' if result == 0 else f'PTRACE_SEIZE of a child: {os.strerror(ctypes.get_errno())}'
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _systemd() -> str:
    """A systemd to boot in a container of our own: the binary, root, and a cgroup2 to give to it."""
    return _file('/lib/systemd/systemd', '/usr/lib/systemd/systemd')() or _root() or _cgroup2()


def _user_namespaces() -> str:
    """Whether an ordinary user may make one, and in it a pid namespace and a /proc of its own."""
    drop = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'] if os.geteuid() == 0 else []
    try:
        done = subprocess.run([*drop, 'unshare', '--user', '--map-root-user', '--pid', '--fork', '--mount-proc',
                               'true'], capture_output=True, text=True, check=False, cwd='/')
    except FileNotFoundError as error:
        return f'no {error.filename} on PATH'
    return f'an ordinary user cannot make one: {done.stderr.strip()}' if done.returncode else ''


def _audit() -> str:
    """Whether root may give a process that has one another login uid, as pam_loginuid does."""
    own = Path('/proc/self/loginuid')
    if not own.exists():
        return f'no {own}'
    child = os.fork()
    if child == 0:
        try:
            own.write_text('65534')
            os._exit(0)
        finally:
            os._exit(1)
    return '' if os.waitpid(child, 0)[1] == 0 else f'{own} cannot be set'


def _keyrings() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(NR_KEYCTL, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 1)
    return '' if found >= 0 else f'keyctl: {os.strerror(ctypes.get_errno())}'


def _seccomp_notify() -> str:
    """Whether a system call can be asked about: where a filter with a listener is around us, there is no second."""
    kinds = Path('/proc/sys/kernel/seccomp/actions_avail')
    if not kinds.exists() or 'user_notif' not in kinds.read_text().split():
        return f'no user_notif in {kinds}'
    lines = Path('/proc/self/status').read_text().splitlines()
    return '' if 'Seccomp:\t0' in lines else 'running under a seccomp filter, which may have a listener'


APT = 'sudo apt-get install -y '
NEEDS = {
    'root': Need(_root, 'run as root: sudo make test'),
    'cgroup2': Need(_cgroup2, 'sudo mount -t cgroup2 none /sys/fs/cgroup/unified, and run as root'),
    'cgroup1': Need(lambda: '' if cgroup1_mount() else 'no memory or pids hierarchy of version 1 is mounted',
                    'sudo mount -t cgroup -o pids none /sys/fs/cgroup/pids, where cgroup2 has not that controller'),
    'ptrace': Need(_ptrace, 'sudo sysctl kernel.yama.ptrace_scope=0, or run as root with CAP_SYS_PTRACE'),
    'systemd': Need(_systemd, APT + 'systemd util-linux, and run as root'),
    'user-namespaces': Need(_user_namespaces, 'sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 '
                            'user.max_user_namespaces=10000, and ' + APT + 'util-linux'),
    'mmap-min-addr': Need(_sysctl('vm.mmap_min_addr'), 'sudo sysctl vm.mmap_min_addr=65536'),
    'pipe-user-pages-soft': Need(_sysctl('fs.pipe-user-pages-soft'), 'sudo sysctl fs.pipe-user-pages-soft=16384'),
    'set-user-ID': Need(_set_user_id, 'TMPDIR=/var/tmp make test, or another directory without nosuid'),
    'audit': Need(_audit, 'boot a kernel with CONFIG_AUDIT=y, and run as root with CAP_AUDIT_CONTROL'),
    'keyrings': Need(_keyrings, 'boot a kernel with CONFIG_KEYS=y, outside of a container that forbids keyctl(2)'),
    'seccomp-notify': Need(_seccomp_notify, 'boot a kernel with CONFIG_SECCOMP_FILTER=y, outside of a container that '
                           'has a listener of its own'),
    'time-namespaces': Need(_file('/proc/self/ns/time'), 'boot a kernel with CONFIG_TIME_NS=y'),
    'user-session': Need(_file('/usr/lib/systemd/user/dbus.socket'), APT + 'dbus-user-session libpam-systemd'),
    'systemd-analyze': Need(_program('systemd-analyze'), APT + 'systemd'),
    'busctl': Need(_program('busctl'), APT + 'systemd'),
    'dbus': Need(_program('dbus-daemon'), APT + 'dbus'),
    'dbus-broker': Need(_program('dbus-broker'), APT + 'dbus-broker'),
    'polkit': Need(_file('/usr/lib/polkit-1/polkitd', '/usr/libexec/polkitd'), APT + 'polkitd'),
    'curl': Need(_program('curl'), APT + 'curl'),
    'gcc': Need(_program('gcc'), APT + 'gcc libc6-dev'),
    'fuse': Need(_fuse, 'sudo modprobe fuse'),
    'gdb': Need(_program('gdb'), APT + 'gdb'),
    'gpg': Need(_program('gpg', 'gpg-agent', 'gpgconf'), APT + 'gpg gpg-agent'),
    'inotifywait': Need(_program('inotifywait'), APT + 'inotify-tools'),
    'mariadb': Need(_program('mariadbd', 'mariadb', 'mariadb-install-db'), APT + 'mariadb-server'),
    'memcached': Need(_program('memcached'), APT + 'memcached'),
    'mosquitto': Need(_program('mosquitto', 'mosquitto_sub'), APT + 'mosquitto mosquitto-clients'),
    'nginx': Need(_program('nginx'), APT + 'nginx-light'),
    'postgres': Need(lambda: '' if list(Path('/usr/lib/postgresql').glob('*/bin/psql')) else 'no postgres',
                     APT + 'postgresql'),
    'redis': Need(_program('redis-server'), APT + 'redis-server'),
    'rsync': Need(_program('rsync'), APT + 'rsync'),
    'ssh': Need(_program('ssh', 'ssh-agent', 'ssh-add', 'ssh-keygen'), APT + 'openssh-client'),
    'less': Need(_program('less'), APT + 'less'),
    'screen': Need(_program('screen'), APT + 'screen'),
    'tmux': Need(_program('tmux'), APT + 'tmux'),
    'vim': Need(_program('vim'), APT + 'vim'),
    'strace': Need(_program('strace'), APT + 'strace'),
    'sqlite3': Need(_program('sqlite3'), APT + 'sqlite3'),
    'perl': Need(_program('perl'), APT + 'perl'),
    'node': Need(_program('node'), APT + 'nodejs'),
    'java': Need(_program('java', 'javac'), APT + 'default-jdk-headless'),
    'ip': Need(_program('ip', 'ss'), APT + 'iproute2'),
    'ps': Need(_program('ps'), APT + 'procps'),
    'man': Need(_program('man', 'groff', 'lexgrog'), APT + 'man-db'),
    'mandoc': Need(_program('mandoc'), APT + 'mandoc'),
    'unshare': Need(_program('unshare', 'nsenter'), APT + 'util-linux'),
    # of `make programs`; CONTRIBUTING.md has the packages in one line
    'chromium': Need(_program('chromium'), APT + 'chromium', heavy=True),
    'apache': Need(_program('apache2', 'ab'), APT + 'apache2 apache2-utils', heavy=True),
    'emacs': Need(_program('emacs'), APT + 'emacs-nox', heavy=True),
    'go': Need(_program('go'), APT + 'golang-go', heavy=True),
    'htop': Need(_program('htop'), APT + 'htop', heavy=True),
    'programs-of-python': Need(_file('.cache/programs/bin/gunicorn'), 'make programs', heavy=True),
    'sshd': Need(_program('sshd'), APT + 'openssh-server', heavy=True),
    'stress-ng': Need(_program('stress-ng'), APT + 'stress-ng', heavy=True),
    'ipython': Need(_file('/usr/bin/ipython3'), APT + 'ipython3', heavy=True),
    'pexpect': Need(_file('/usr/lib/python3/dist-packages/pexpect'), APT + 'python3-pexpect', heavy=True),
    'tk': Need(lambda: '' if list(Path('/usr/lib').glob('python3.*/lib-dynload/_tkinter.*')) else 'no tkinter',
               APT + 'python3-tk', heavy=True),
    'xdotool': Need(_program('xdotool', 'xwd'), APT + 'xdotool x11-apps', heavy=True),
    'xterm': Need(_program('xterm'), APT + 'xterm', heavy=True),
    'xvfb': Need(_program('Xvfb'), APT + 'xvfb', heavy=True),
}


@functools.cache
def missing(name: str) -> str:
    """Why `name` cannot be had here, '' when it can. Asked once a process."""
    return NEEDS[name].missing()


def required() -> frozenset[str]:
    """The names in CKPTD_REQUIRE; `all` is every one. ValueError for a name that no test knows."""
    names = frozenset(filter(None, os.environ.get('CKPTD_REQUIRE', '').replace(' ', ',').split(',')))
    if 'all' in names:
        return frozenset(NEEDS)
    unknown = names - NEEDS.keys()
    if unknown:
        raise ValueError(f'CKPTD_REQUIRE: unknown {", ".join(sorted(unknown))}; known: all, {", ".join(NEEDS)}')
    return names


def verdict(names: Iterable[str]) -> tuple[str, bool]:
    """(why a test that needs `names` cannot run, whether that is a failure); ('', False) when it can."""
    for name in names:
        reason = missing(name)
        if reason:
            return f'needs {name}: {reason}. To have it: {NEEDS[name].fix}', name in required()
    return '', False


def summary() -> list[str]:
    """One line for each thing that `make test` needs and that is not there."""
    return [f'{name}: {missing(name)}. To have it: {need.fix}' for name, need in NEEDS.items()
            if not need.heavy and missing(name)]


if __name__ == '__main__':
    with contextlib.suppress(BrokenPipeError):
        print('\n'.join(summary()) or 'nothing is missing')
    sys.exit(bool(summary()))
