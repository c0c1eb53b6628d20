# SPDX-License-Identifier: LGPL-2.1-or-later
"""Probe every kernel feature and right that ckptd uses: whether it is present, what is lost without it, how to get it.

The feature is tried, and the version is never used (feature_tests.py has the experiments). They run in a child process.
If a seccomp filter kills the child, or it hangs, that feature is unknown and a new child continues with the next.
"""

import contextlib
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ckptd.kernel import creds, feature_tests
from ckptd.kernel.cgroup import Cgroup
from ckptd.kernel.fork import quiet_fork

_TIMEOUT = 5.0      # seconds without an answer after which an experiment is given up
_GRACE = 0.5        # seconds for a child to exit after its last answer

_OLD = 'boot a newer kernel'
_ROOT = 'run as root'
_CAPABILITY = 'run as root, or as a service with AmbientCapabilities={0} (and {0} in CapabilityBoundingSet=)'
_PTRACE = 'allow ptrace: kernel.yama.ptrace_scope=0 or 1, and no seccomp filter or container policy against it'
_DELEGATE = 'run as root, or in a delegated scope: systemd-run --user --scope -p Delegate=yes ...'
_CR = 'boot a kernel with CONFIG_CHECKPOINT_RESTORE=y'


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature or right."""
    name: str
    present: bool | None    # None if unknown
    required: bool          # without it no checkpoint is possible
    needed_for: str
    lost: str               # what its absence costs
    hint: str               # how to get it
    detail: str             # what was found, or the kernel's error


class _Probe(NamedTuple):
    name: str
    test: Callable[[], str]
    needed_for: str
    lost: str
    hint: str
    required: bool = False


def _capability(name: str, needed_for: str, lost: str) -> _Probe:
    return _Probe(name, feature_tests.capability(getattr(creds, name)), needed_for, lost, _CAPABILITY.format(name))


PROBES: Sequence[_Probe] = (
    _Probe('pidfd_open', feature_tests.open_pidfd, 'holding each task of a tree', 'everything', _OLD + ' (5.3)', True),
    _Probe('pidfd_send_signal', feature_tests.signal_pidfd, 'killing exactly the tree that was checkpointed (--kill)',
           '--kill', _OLD + ' (5.1)'),
    _Probe('PIDFD_THREAD', feature_tests.thread_pidfd, 'holding each thread of a tree',
           'threads are told apart by their start time only', _OLD + ' (6.9)'),
    _Probe('pidfd_getfd', feature_tests.getfd, 'reading open files of a task', 'everything', _PTRACE, True),
    _Probe('kcmp', feature_tests.compare, 'what tasks share, and the permission check', 'everything',
           'boot a kernel with CONFIG_KCMP=y, and allow kcmp in seccomp filters', True),
    _Probe('/proc/PID/task/TID/children', feature_tests.children_files, 'scanning a tree', 'everything',
           'boot a kernel with CONFIG_PROC_CHILDREN=y', True),
    _Probe('processes of others in /proc', feature_tests.other_users_processes, 'scanning a tree of several users',
           'trees of other users are invisible', 'mount /proc with hidepid=0, or ' + _ROOT),
    _Probe('file descriptors', feature_tests.many_fds,
           f'a pidfd per task of a tree of {feature_tests.LARGE_TREE} tasks',
           'large trees cannot be held', 'raise the hard limit: LimitNOFILE= of the service, or ulimit -Hn'),
    _Probe('PTRACE_SEIZE', feature_tests.seize, 'registers, signals, and stopping tasks without a freezer',
           'everything',
           _PTRACE, True),
    _Probe('PTRACE_PEEKSIGINFO', feature_tests.pending_signals, 'pending signals', 'everything', _CR, True),
    _Probe('PTRACE_GET_RSEQ_CONFIGURATION', feature_tests.rseq_configuration, 'the rseq area of a thread',
           'the restart of programs that use rseq (glibc 2.35 and newer)', _OLD + ' (5.13) with CONFIG_RSEQ=y'),
    _Probe('/proc/PID/mem', feature_tests.write_memory, 'remote system calls', 'everything',
           'remove the kernel option that forbids writing to a tracee (proc_mem.force_override=never)', True),
    _Probe('yama ptrace_scope', feature_tests.ptrace_scope, 'tracing tasks that ckptd did not start itself',
           'only own children, so --standalone on a running tree fails',
           'sysctl kernel.yama.ptrace_scope=0, or give ckptd CAP_SYS_PTRACE'),
    _Probe('process_vm_readv', feature_tests.readv, 'copying memory', 'everything',
           'boot a kernel with CONFIG_CROSS_MEMORY_ATTACH=y', True),
    _Probe('/proc/PID/pagemap', feature_tests.pagemap, 'choosing the pages to write', 'everything',
           'boot a kernel with CONFIG_PROC_PAGE_MONITOR=y', True),
    _Probe('PAGEMAP_SCAN', feature_tests.pagemap_scan, 'choosing pages fast, and leaving out pages of zeros',
           'pagemap is read word by word, and zero pages are written', _OLD + ' (6.7)'),
    _Probe('guard regions', feature_tests.guard_regions, 'MADV_GUARD_INSTALL ranges', 'guard pages are not restored',
           _OLD + ' (6.15)'),
    _Probe('soft-dirty', feature_tests.soft_dirty, 'incremental images (to come)', 'each image has all pages',
           'boot a kernel with CONFIG_MEM_SOFT_DIRTY=y'),
    _Probe('/proc/PID/map_files', feature_tests.map_files, 'mapped files that are deleted or hidden by a mount',
           'trees that map such files are refused', _CAPABILITY.format('CAP_CHECKPOINT_RESTORE')),
    _Probe('/proc/PID/timers', feature_tests.timers_file, 'POSIX timers', 'POSIX timers are not in the image', _CR),
    _Probe('cgroup v2', feature_tests.cgroup_mounted, 'freezing without ptrace', 'the ptrace freezer is used',
           'mount -t cgroup2 cgroup2 /sys/fs/cgroup (systemd does)'),
    _Probe('cgroup v2 writable', feature_tests.cgroup_writable,
           'a child cgroup for a tree that shares its own with others',
           'the ptrace freezer is used', _DELEGATE),
    _Probe('cgroup.freeze', feature_tests.cgroup_freeze, 'freezing a tree at once', 'the ptrace freezer is used',
           _OLD + ' (5.2)'),
    _Probe('cgroup.kill', feature_tests.cgroup_kill, 'killing a tree at once', 'tasks are killed one by one',
           _OLD + ' (5.14)'),
    _Probe('clone3 set_tid', feature_tests.set_tid, 'restarting with the same pids', 'restart',
           _CAPABILITY.format('CAP_CHECKPOINT_RESTORE')),
    _Probe('proc connector', feature_tests.proc_connector, 'seeing forks and exits during a job',
           'the tree is scanned again',
           'run in the first pid and network namespace, with CAP_NET_ADMIN before Linux 6.6 (CONFIG_PROC_EVENTS=y)'),
    _Probe('sock_diag', feature_tests.sock_diag, 'unix sockets and their peers', 'refusals do not name the other end',
           'modprobe unix_diag, or boot a kernel with CONFIG_UNIX_DIAG=y'),
    _capability('CAP_SYS_PTRACE', 'trees of other users', 'only trees of the own user'),
    _capability('CAP_CHECKPOINT_RESTORE', 'map_files, and choosing pids at restart', 'restart with the same pids'),
    _capability('CAP_SYS_ADMIN', 'namespaces at restart', 'restart in a namespace of its own'),
    _capability('CAP_SYS_RESOURCE', 'raising hard limits at restart', 'limits above those of ckptd are not restored'),
    _capability('CAP_SYS_NICE', 'timer slack of other users\' tasks, and real-time scheduling at restart',
                'the default timer slack is assumed'),
    _capability('CAP_DAC_READ_SEARCH', 'content of deleted files of other users', 'trees with such files are refused'),
    _capability('CAP_DAC_OVERRIDE', 'cgroups and files of other users', 'the ptrace freezer is used'),
    _capability('CAP_KILL', '--kill of trees of other users', '--kill of own trees only'),
    _capability('CAP_SETUID', 'asking the kernel as the caller, and credentials at restart',
                'only calls of the own user are served'),
    _capability('CAP_SETGID', 'asking the kernel as the caller, and credentials at restart',
                'only calls of the own user are served'),
    _capability('CAP_SETPCAP', 'capability bounds at restart', 'such trees cannot be restarted'),
    _capability('CAP_CHOWN', 'owners of files at restart', 'files belong to the restarting user'),
    _capability('CAP_FOWNER', 'modes and times of other users\' files at restart', 'such files are refused at restart'),
    _capability('CAP_SYS_CHROOT', 'trees with a root directory of their own, at restart',
                'such trees cannot be restarted'),
    _capability('CAP_NET_ADMIN', 'the proc connector before Linux 6.6', 'the tree is scanned again'),
)


def probe_features() -> list[Feature]:
    """Try everything in order; it takes 0.3 s. No process, fd or cgroup is left behind."""
    answers: list[_Answer] = []
    while len(answers) < len(PROBES):
        answers += _try(PROBES[len(answers):])
    return [Feature(probe.name, answer.present, probe.required, probe.needed_for, probe.lost, probe.hint, answer.detail)
            for probe, answer in zip(PROBES, answers, strict=True)]


class _Answer(NamedTuple):
    present: bool | None
    detail: str


def _try(probes: Sequence[_Probe]) -> list[_Answer]:
    """Return answers to the first of these probes, at least one; to all, unless the child ends early."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = quiet_fork()      # if the child waits for a lock of another thread, it is ended after _TIMEOUT
    if pid == 0:
        _child(probes, writer)
    os.close(writer)
    pidfd = os.pidfd_open(pid)
    try:
        answers = _collect(reader, pidfd, len(probes))
        how = _end(pid, pidfd)
    finally:
        os.close(pidfd)
        os.close(reader)
    if len(answers) < len(probes):
        answers.append(_Answer(None, how))
    return answers


def _child(probes: Sequence[_Probe], writer: int) -> None:
    try:
        # Tracee.stop waits for SIGCHLD with sigtimedwait(2)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        for probe in probes:
            os.write(writer, json.dumps(_answer(probe.test)).encode() + b'\n')
    finally:
        os._exit(0)


def _answer(test: Callable[[], str]) -> _Answer:
    try:
        return _Answer(True, test())
    except OSError as error:
        return _Answer(False, error.strerror or str(error))
    except (feature_tests.Unknown, ArithmeticError, LookupError, ValueError, struct.error, ImportError) as error:
        # text in /proc that cannot be parsed proves nothing about the feature
        return _Answer(None, str(error) or type(error).__name__)


def _collect(reader: int, pidfd: int, count: int) -> list[_Answer]:
    data, last = b'', time.monotonic()
    while data.count(b'\n') < count:
        # the end of the pipe proves nothing: a frozen child of an experiment may hold its other end
        ready = select.select([reader, pidfd], [], [], max(0.0, last + _TIMEOUT - time.monotonic()))[0]
        if reader not in ready:
            break
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            break
        data, last = data + chunk, time.monotonic()
    rows: list[Any] = [json.loads(line) for line in data.split(b'\n')[:-1]]
    return [_Answer(present, detail) for present, detail in rows]


def _end(pid: int, pidfd: int) -> str:
    """Reap the child, by force if it still runs, and remove what it left. Return how it ended."""
    alive = not select.select([pidfd], [], [], _GRACE)[0]
    if alive:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    _remove_cgroup_of(pid)
    if alive:
        return f'no answer within {_TIMEOUT:g} s'
    if os.WIFSIGNALED(status):
        return f'the experiment was ended by {signal.Signals(os.WTERMSIG(status)).name}'
    return 'the experiment ended early'


def _remove_cgroup_of(pid: int) -> None:
    """Remove the cgroup of a child that was killed in the middle of a cgroup experiment."""
    with contextlib.suppress(OSError):      # usually there is none
        group = Cgroup.of(os.getpid()).path / f'{feature_tests.CGROUP_PREFIX}{pid}'
        for member in Cgroup(group).procs():
            os.kill(member, signal.SIGKILL)     # SIGKILL ends a frozen task, too
        Cgroup(group).wait_empty(time.monotonic() + feature_tests.PATIENCE)
        group.rmdir()


def main() -> None:
    """Print the features as JSON: python -m ckptd.kernel.probe. A client runs it, because it must not try such things
    itself."""
    json.dump([asdict(feature) for feature in probe_features()], sys.stdout)


if __name__ == '__main__':
    main()
