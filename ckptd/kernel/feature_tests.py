# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small experiments for probe.py, one per kernel feature. Each returns a detail, or raises OSError (absent) or Unknown.

They run in a separate process (probe.py). Everything they create is removed by `TestChild` and `probe_cgroup`.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from ckptd.kernel import cgroup, kcmp, maps, memory, mountinfo, netlink, pidfd, ptrace, task, yama
from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.clone import clone_args
from ckptd.kernel.creds import CAP_SYS_PTRACE, capget
from ckptd.kernel.decl import c_long, c_size_t, c_void_p, syscall

CGROUP_PREFIX = 'ckptd-probe-'
PATIENCE = 1.0                  # seconds that each experiment may wait
LARGE_TREE = 10_000             # tasks, with one pidfd each

_TEXT = b'what a child shares with its parent'
_BUFFER = ctypes.create_string_buffer(_TEXT)
_ADDRESS = ctypes.addressof(_BUFFER)


class Unknown(Exception):
    """A feature cannot be tried here, so the answer is unknown."""


@syscall(NR['clone3'])
def _clone3(args: c_void_p, size: c_size_t) -> c_long: ...


class TestChild:
    """A process that waits for the end of a pipe, so it dies with this process in any case. `fd` is open in the child
    only."""

    def __enter__(self) -> Self:
        self.fd, self._end = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._end)
            os.read(self.fd, 1)
            os._exit(0)
        os.close(self.fd)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._end)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def probe_cgroup() -> Iterator[cgroup.Cgroup]:
    """Make an empty cgroup below our own. Unknown if that is not allowed."""
    try:
        group = cgroup.Cgroup.of(os.getpid()).create(f'{CGROUP_PREFIX}{os.getpid()}')
    except OSError as error:
        raise Unknown(f'cannot make a cgroup for the test ({error.strerror})') from None
    try:
        yield group
    finally:
        group.remove()


# ---------------------------------------------------------------- pidfd, kcmp, /proc

def open_pidfd() -> str:
    with TestChild() as child:
        os.close(pidfd.pidfd_open(child.pid))
    return ''


def thread_pidfd() -> str:
    with TestChild() as child:
        os.close(pidfd.pidfd_open(child.pid, pidfd.PIDFD_THREAD))
    return ''


def signal_pidfd() -> str:
    with TestChild() as child, _opened(pidfd.pidfd_open(child.pid)) as fd:
        pidfd.pidfd_send_signal(fd, 0)
    return ''


def getfd() -> str:
    with TestChild() as child, _opened(pidfd.pidfd_open(child.pid)) as fd:
        os.close(pidfd.pidfd_getfd(fd, child.fd))
    return ''


def compare() -> str:
    with TestChild() as child:
        kcmp.kcmp(os.getpid(), child.pid, kcmp.KCMP_VM)
    return ''


def children_files() -> str:
    with TestChild() as child:
        if child.pid not in task.read_children(os.getpid(), os.getpid()):
            raise Unknown('an own child is not listed')
    return ''


def timers_file() -> str:
    task.read_timers(os.getpid())
    return ''


def map_files() -> str:
    mapping = next((one for one in maps.read_maps(os.getpid()) if one.file_path), None)
    if mapping is None:
        raise Unknown('this process maps no file')
    # following the link needs a capability, reading it does not
    os.close(os.open(f'/proc/self/map_files/{mapping.start:x}-{mapping.end:x}', os.O_PATH | os.O_CLOEXEC))
    return ''


def other_users_processes() -> str:
    hidden = [option for mount in mountinfo.read_mountinfo() if mount.fs_type == 'proc' and mount.mount_point == '/proc'
              for option in mount.super_options if option.startswith('hidepid=')]
    if hidden and hidden[-1] not in ('hidepid=0', 'hidepid=off') and os.geteuid() != 0:
        raise OSError(errno.EACCES, f'/proc is mounted with {hidden[-1]}')
    return hidden[-1] if hidden else ''


def many_fds() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f'limit {soft}, can be raised to {hard}'
    if hard != resource.RLIM_INFINITY and hard < LARGE_TREE:
        raise OSError(errno.EMFILE, detail)
    return detail


# ---------------------------------------------------------------- ptrace and memory

def seize() -> str:
    with _stopped_child() as (_, tracee):
        return f'{len(tracee.xstate())} bytes of extended registers'


def rseq_configuration() -> str:
    with _stopped_child() as (child, _):
        config = ptrace.ptrace_rseq_configuration()
        ptrace.ptrace(ptrace.PTRACE_GET_RSEQ_CONFIGURATION, child.pid, ctypes.sizeof(config), ctypes.byref(config))
    return ''


def pending_signals() -> str:
    with _stopped_child() as (_, tracee):
        tracee.pending(shared=True)
    return ''


def write_memory() -> str:
    with _stopped_child() as (child, _), memory.Mem(child.pid) as mem:
        mem.write(_ADDRESS, mem.read(_ADDRESS, len(_TEXT)))
    return ''


def ptrace_scope() -> str:
    if not Path(yama.PTRACE_SCOPE).exists():
        return 'this kernel has no Yama'
    scope = yama.ptrace_scope()
    capable = capget().effective >> CAP_SYS_PTRACE & 1
    if scope == yama.NOBODY or (scope and not capable):
        raise OSError(errno.EPERM, f'kernel.yama.ptrace_scope is {scope}')
    return f'ptrace_scope {scope}'


def readv() -> str:
    local = ctypes.create_string_buffer(len(_TEXT))
    with TestChild() as child:
        memory.read_into(child.pid, [(_ADDRESS, _ADDRESS + len(_TEXT))], ctypes.addressof(local))
    if local.raw != _TEXT:
        raise OSError(errno.EIO, 'process_vm_readv copied other data')
    return ''


def pagemap() -> str:
    with TestChild() as child, memory.PageMap(child.pid) as pages:
        if len(os.pread(pages.fd, 8, _ADDRESS // memory.PAGE * 8)) != 8:
            raise OSError(errno.EIO, 'pagemap is empty')
    return ''


def pagemap_scan() -> str:
    with TestChild() as child, memory.PageMap(child.pid) as pages:
        _scan(pages.fd, memory.PAGE_IS_PRESENT)
    return ''


def guard_regions() -> str:
    with TestChild() as child, memory.PageMap(child.pid) as pages:
        _scan(pages.fd, memory.PAGE_IS_GUARD)
    return ''


def soft_dirty() -> str:
    with mmap.mmap(-1, mmap.PAGESIZE):      # every new mapping starts as dirty
        if not any('sd' in one.vm_flags for one in maps.read_smaps(os.getpid())):
            raise OSError(errno.EOPNOTSUPP, 'a new mapping lacks the flag')
    return ''


# ---------------------------------------------------------------- cgroups

def cgroup_mounted() -> str:
    mounts = mountinfo.read_mountinfo()
    mount = cgroup.mount_of(mounts)
    if mount is None:
        raise FileNotFoundError(errno.ENOENT, 'no cgroup v2 hierarchy is mounted')
    hybrid = any(one.fs_type == 'cgroup' for one in mounts)
    return f'{mount.path} ({"hybrid" if hybrid else "pure"})'


def cgroup_writable() -> str:
    own = cgroup.Cgroup.of(os.getpid())
    try:
        with probe_cgroup() as group, TestChild() as child:
            group.attach(child.pid)
    except Unknown as error:
        raise OSError(errno.EACCES, f'{own.path}: {error}') from None
    return str(own.path)


def cgroup_freeze() -> str:
    with probe_cgroup() as group, TestChild() as child:
        group.attach(child.pid)
        began = time.monotonic()
        group.freeze()
        if not group.wait(True, began + PATIENCE):
            raise OSError(errno.ETIMEDOUT, f'a sleeping process was not frozen within {PATIENCE:.0f} s')
        return f'{(time.monotonic() - began) * 1000:.1f} ms'


def cgroup_kill() -> str:
    with probe_cgroup() as group, TestChild() as child:
        group.attach(child.pid)
        with _opened(pidfd.pidfd_open(child.pid)) as fd:
            group.kill()
            if not pidfd.wait_dead(fd, PATIENCE):
                raise OSError(errno.ETIMEDOUT, 'a process survived it')
    return ''


# ---------------------------------------------------------------- creating tasks, netlink, rights

def set_tid() -> str:
    # Our own pid is taken, so the kernel checks the right to choose a pid and then makes no task.
    wanted = ctypes.c_int(os.getpid())
    args = clone_args(exit_signal=signal.SIGCHLD, set_tid=ctypes.addressof(wanted), set_tid_size=1)
    try:
        pid = _clone3(ctypes.byref(args), ctypes.sizeof(args))
    except FileExistsError:
        return ''
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return ''


def proc_connector() -> str:
    with netlink.ForkWatch() as watch:
        if not watch.available:
            raise OSError(errno.EOPNOTSUPP, watch.reason)
    return ''


def sock_diag() -> str:
    return f'{len(netlink.unix_sockets())} unix sockets'


def capability(number: int) -> Callable[[], str]:
    """Make the experiment for one CAP_*: whether it is effective now."""
    def test() -> str:
        own = capget()
        if not own.effective >> number & 1:
            held = own.permitted >> number & 1
            raise OSError(errno.EPERM, 'permitted but not effective' if held else 'not permitted')
        return ''
    return test


# ---------------------------------------------------------------- helpers

@contextlib.contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _stopped_child() -> Iterator[tuple[TestChild, ptrace.Tracee]]:
    with TestChild() as child, ptrace.Tracee.seize(child.pid) as tracee:
        tracee.stop(time.monotonic() + PATIENCE)
        yield child, tracee


def _scan(fd: int, category: int) -> None:
    vector = memory.page_region()
    arg = memory.pm_scan_arg(size=ctypes.sizeof(memory.pm_scan_arg), end=memory.PAGE, vec=ctypes.addressof(vector),
                             vec_len=1, category_anyof_mask=category, return_mask=category)
    fcntl.ioctl(fd, memory.PAGEMAP_SCAN, arg)
