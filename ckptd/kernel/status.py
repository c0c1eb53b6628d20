# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/status: ids, masks and capabilities of a task (proc_pid_status(5))."""

from typing import NamedTuple

from ckptd.kernel.procfs import read_task_file, task_dir, text

Four = tuple[int, int, int, int]
NO_TAGS = (1 << 64) - 1     # of untag_mask: every bit of an address counts


class Status(NamedTuple):
    """The contents of a status file.

    Signal masks: bit n-1 is signal n. cap_*: bit n is capability n. ns_*: the id in each pid namespace, the outermost
    (the reader's) first. Fields that a zombie lacks are 0 or empty (umask, vm_rss, tracer).
    """
    name: str
    umask: int
    state: str
    tgid: int
    pid: int
    ppid: int
    tracer_pid: int
    uids: Four    # real, effective, saved, file system
    gids: Four    # real, effective, saved, file system
    groups: tuple[int, ...]
    ns_tgid: tuple[int, ...]
    ns_pid: tuple[int, ...]
    ns_pgid: tuple[int, ...]
    ns_sid: tuple[int, ...]
    kthread: bool    # False where the kernel does not report it; then Stat.flags has PF_KTHREAD
    vm_rss: int      # bytes
    vm_lck: int      # bytes
    threads: int
    sig_pnd: int
    shd_pnd: int
    sig_blk: int
    sig_ign: int
    sig_cgt: int
    cap_inh: int
    cap_prm: int
    cap_eff: int
    cap_bnd: int
    cap_amb: int
    no_new_privs: bool
    seccomp: int            # 0 off, 1 strict, 2 filter
    seccomp_filters: int    # 0 where the kernel does not count them
    untag_mask: int         # bits of an address that count; NO_TAGS without tagged addresses (LAM of x86-64)


def parse_status(data: bytes) -> Status:
    """Parse a status file. KeyError or ValueError if it is malformed."""
    # processor and memory masks, a third of the text, are not needed; behind them are lines of one architecture
    wanted, _, rest = data.partition(b'\nCpus_allowed:')
    lines = wanted.rstrip(b'\n').split(b'\n')
    tags = rest.rpartition(b'\nuntag_mask:\t')[2] if b'\nuntag_mask:' in rest else b''
    field: dict[bytes, bytes] = dict([line.split(b':\t', 1) for line in lines])
    get = field.get
    return Status(
        text(_unescape(field[b'Name'])), int(get(b'Umask', b'0'), 8), chr(field[b'State'][0]),
        int(field[b'Tgid']), int(field[b'Pid']), int(field[b'PPid']), int(field[b'TracerPid']),
        _four(field[b'Uid']), _four(field[b'Gid']), _ints(get(b'Groups', b'')),
        _ints(field[b'NStgid']), _ints(field[b'NSpid']), _ints(field[b'NSpgid']), _ints(field[b'NSsid']),
        get(b'Kthread') == b'1', int(get(b'VmRSS', b'0 kB')[:-3]) * 1024,
        int(get(b'VmLck', b'0 kB')[:-3]) * 1024, int(get(b'Threads', b'0')),
        int(get(b'SigPnd', b'0'), 16), int(get(b'ShdPnd', b'0'), 16), int(get(b'SigBlk', b'0'), 16),
        int(get(b'SigIgn', b'0'), 16), int(get(b'SigCgt', b'0'), 16),
        int(field[b'CapInh'], 16), int(field[b'CapPrm'], 16), int(field[b'CapEff'], 16), int(field[b'CapBnd'], 16),
        int(get(b'CapAmb', b'0'), 16),
        get(b'NoNewPrivs') == b'1', int(get(b'Seccomp', b'0')), int(get(b'Seccomp_filters', b'0')),
        int(tags.split(b'\n', 1)[0], 16) if tags else NO_TAGS)


class NsIds(NamedTuple):
    """The ids of a task in each pid namespace, the outermost (the reader's) first."""
    tgid: tuple[int, ...]
    pid: tuple[int, ...]
    pgid: tuple[int, ...]
    sid: tuple[int, ...]


def parse_ns_ids(data: bytes) -> NsIds:
    """Parse four neighbouring lines of the file, for a scan. It takes a tenth of the time of parse_status."""
    tgid, pid, pgid, sid, _ = data[data.index(b'\nNStgid:') + 1:].split(b'\n', 4)
    return NsIds(_ints(tgid[7:]), _ints(pid[6:]), _ints(pgid[7:]), _ints(sid[6:]))


def read_ns_ids(pid: int, tid: int | None = None) -> NsIds:
    """Read the namespace ids of a task. ProcessLookupError when it is gone."""
    return parse_ns_ids(read_task_file(task_dir(pid, tid), 'status'))


def read_status(pid: int, tid: int | None = None) -> Status:
    """Read the status of a process, or of its thread `tid`. ProcessLookupError when it is gone."""
    return parse_status(read_task_file(task_dir(pid, tid), 'status'))


def read_locked(tid: int) -> int:
    """Read the bytes of locked memory of a task (VmLck), in a tenth of the time of read_status."""
    value = read_task_file(task_dir(tid), 'status').partition(b'\nVmLck:\t')[2].partition(b'kB')[0]
    return int(value or b'0') * 1024


def _ints(value: bytes) -> tuple[int, ...]:
    return tuple(map(int, value.split()))


def _four(value: bytes) -> Four:
    first, second, third, fourth = map(int, value.split())
    return first, second, third, fourth


def _unescape(name: bytes) -> bytes:
    # the Name line, unlike stat, escapes backslash and newline (proc_task_name in fs/proc/array.c)
    if b'\\' not in name:
        return name
    return name.replace(b'\\\\', b'\0').replace(b'\\n', b'\n').replace(b'\0', b'\\')
