# SPDX-License-Identifier: LGPL-2.1-or-later
"""An oracle that knows nothing of ckptd: what /proc says of a tree, taken before and after, compared line by line.

    before = take_picture(pid)
    ...
    assert not differences(before, take_picture(pid))

Compared: ids, states, masks and sets of status, limits, mappings with their flags, open files with position and flags,
namespaces, links, cgroup, timers, scheduling, the place in the tree. Left out is what a process that only waits may
change by itself: counters, times, how many of its pages are there. `moving` leaves out what one that runs changes too.
"""

import contextlib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

# lines of /proc/PID/status that are counters, or say what another task does at the moment
COUNTERS = frozenset({'VmPeak', 'VmHWM', 'VmRSS', 'RssAnon', 'RssFile', 'RssShmem', 'HugetlbPages', 'VmSwap', 'VmPTE',
                      'voluntary_ctxt_switches', 'nonvoluntary_ctxt_switches', 'THP_enabled', 'SigQ'})
MOVING = frozenset({'State', 'SigPnd', 'ShdPnd', 'SigBlk', 'VmSize', 'VmData', 'VmStk', 'VmLck'})
# of a timerfd the time that is left; the number of an eventfd
FILES_OWN = frozenset({'it_value', 'eventfd-id'})
# names of the smaps flags that the kernel sets by itself: soft-dirty
KERNELS_OWN = {'sd'}
# PF_MCE_PROCESS, MEMALLOC_NOFS, MEMALLOC_NOIO, LOCAL_THROTTLE, MCE_EARLY of <linux/sched.h>: those that a task sets
KEPT_FLAGS = 0x80 | 0x40000 | 0x80000 | 0x100000 | 0x8000000
# rows that a restart does not bring back for a dead task
OF_LIVING = {'SigPnd', 'ShdPnd', 'SigIgn', 'SigCgt', 'SigBlk', 'flags', 'nice', 'personality', 'Cpus_allowed',
             'Cpus_allowed_list', 'policy', 'rt_priority', 'timerslack_ns'}
O_TMPFILE = 0o20200000      # of fcntl.h
# what is told of a task and cannot be the same: when it was made, and numbers that the kernel draws by itself
BORN_ANEW = {('stat', 'start'), ('status', 'FDSize')}
NAMELESS = re.compile(r'(pipe|socket|anon_inode):\[\d+\]|(00:01) \d+ (?=/memfd:|/dev/zero|/SYSV|\[anon_shmem:)'
                      r'|(?<=[\da-f]{2}:[\da-f]{2}) \d+ (?=/.* \(deleted\)$|anon_inode:)'
                      r'|(?<=00:01):\d+ (?=\d+ (\d+|EOF)$)')


@dataclass
class Picture:
    """rows: (pid or tid, file of /proc, name) -> value."""
    rows: dict[tuple[int, str, str], str] = field(default_factory=dict)

    def add(self, task: int, source: str, name: str, value: str) -> None:
        self.rows[task, source, name] = value


def whole_tasks(before: Picture, after: Picture) -> set[int]:
    """Those that lived on while the second picture was taken: one that has ended in the middle of that has no
    namespaces any more."""
    ended = {task for task, source, name in before.rows if source == 'ns' and (task, source, name) not in after.rows}
    return {task for task, _, _ in after.rows} - ended


def take_picture(root: int, *, moving: bool = False) -> Picture:
    """The tree below and with process `root`. moving: its tasks run, so leave out what a running task changes."""
    picture = Picture()
    todo = [root]
    while todo:
        pid = todo.pop()
        _add_process(picture, pid, moving)
        for task in sorted(Path(f'/proc/{pid}/task').iterdir()):
            with contextlib.suppress(*([FileNotFoundError, ProcessLookupError] if moving else [])):
                todo += [int(child) for child in (task / 'children').read_text().split()]
    return picture


def differences(before: Picture, after: Picture) -> list[str]:
    """One sentence for each row that came, went or changed."""
    found = []
    for key in sorted(before.rows.keys() | after.rows.keys()):
        then, now = before.rows.get(key), after.rows.get(key)
        if then != now:
            found.append(f'{key[0]}/{key[1]} {key[2]}: {then!r} -> {now!r}')
    return found


def merged(picture: Picture) -> Picture:
    """The picture with neighbouring mappings of one state as one: when the kernel merges them depends on history."""
    found = Picture({key: value for key, value in picture.rows.items() if not key[1].startswith('maps')})
    spaces: dict[int, dict[tuple[int, int], dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for (pid, source, name), value in picture.rows.items():
        # a policy keeps mappings apart, and is lost (see procdiff)
        if source.startswith('maps') and source != 'maps policy':
            start, end = (int(one, 16) for one in name.split('-'))
            spaces[pid][start, end][source] = value
    for pid, space in spaces.items():
        last: tuple[int, int, dict[str, str]] | None = None
        for (start, end), rows in sorted(space.items()):
            if last and last[1] == start and _continues(last, rows):
                last = last[0], end, {**last[2], **_sum(last[2], rows)}
                continue
            _put(found, pid, last)
            last = start, end, rows
        _put(found, pid, last)
    return found


def _sum(rows: dict[str, str], others: dict[str, str]) -> dict[str, str]:
    """What two mappings together have locked."""
    if 'maps Locked' not in rows:
        return {}
    return {'maps Locked': str(int(rows['maps Locked']) + int(others['maps Locked']))}


def _put(picture: Picture, pid: int, one: tuple[int, int, dict[str, str]] | None) -> None:
    if one:
        for source, value in one[2].items():
            picture.add(pid, source, f'{one[0]:x}-{one[1]:x}', value)


def _continues(last: tuple[int, int, dict[str, str]], rows: dict[str, str]) -> bool:
    """Whether the second mapping goes on where the first ends, also in its file."""
    words, others = last[2]['maps'].split(' '), rows['maps'].split(' ')
    offset = int(others[1], 16) - int(words[1], 16)
    words[1] = others[1] = ''
    same = rows.keys() == last[2].keys() and all(
        last[2][source] == rows[source] for source in rows.keys() - {'maps', 'maps Locked'})
    return words == others and offset in (0, last[1] - last[0]) and same


def changes_of_restart(before: Picture, after: Picture, *, brief: bool = False) -> list[str]:
    """What is not as it was after a restart, but for what no restart brings back. brief: threads may have ended."""
    tasks = whole_tasks(before, after)
    before, after = merged(before), merged(after)
    expected, found = Picture(), Picture()
    for rows, kept in ((before.rows, expected), (after.rows, found)):
        for (task, source, name), value in rows.items():
            if (source, name) in BORN_ANEW or name == 'ino' or name.startswith('tfd'):
                continue
            if source == 'maps policy':
                continue        # of single mappings (mbind(2)); they are lost, as ckptd-restore-limits(7) says
            if source == 'file' and name in ('syscall', 'cgroup'):
                continue        # restart_syscall for what it restarts; of cgroup the dead keep a name that is gone
            is_dead = before.rows.get((task, 'status', 'State'), '').startswith('Z')
            if is_dead and (name in OF_LIVING or source == 'limits'):
                continue        # as ckptd-restore-limits(7) says
            if name.startswith('inotify'):      # the inode of a nameless file is a new one
                value = re.sub(r'ino:\w+ sdev:\w+|fhandle-.*', '', value)
            if brief and (task not in tasks or name in ('threads', 'Threads')):
                continue
            # the name of a file that was made again where another one has its former name
            value = re.sub(r'/\.([^/]*)\.[\da-f]{8} \(deleted\)$', r'/\1 (deleted)', value)
            if name == 'lock':      # the inode of a nameless file is a new one
                value = re.sub(r':\d+ (?=\d+ (\d+|EOF)$)', ' ', value)
                # one of flock(2) belongs to the description; the pid is that of the process which called it
                value = re.sub(r'^(\d+: FLOCK +\w+ +\w+) \d+', r'\1', value)
            if source.startswith('fd ') and name == 'flags' and int(value, 8) & O_TMPFILE == O_TMPFILE:
                # it stays set in the description that made a file without a name; a restart opens an existing file
                value = f'0{int(value, 8) & ~O_TMPFILE:o}'
            kept.rows[task, source, name] = NAMELESS.sub(r'\1\2', value)
    return differences(expected, found)


def _add_process(picture: Picture, pid: int, moving: bool) -> None:
    proc = Path(f'/proc/{pid}')
    for name in ('exe', 'cwd', 'root'):
        with contextlib.suppress(OSError):      # a zombie has none
            picture.add(pid, 'link', name, str((proc / name).readlink()))
    for name in ('cmdline', 'environ', 'oom_score_adj', 'loginuid', 'cgroup', 'cpuset', 'timers', 'personality',
                 'coredump_filter', 'uid_map', 'gid_map', 'projid_map', 'setgroups'):
        with contextlib.suppress(OSError):
            picture.add(pid, 'file', name, (proc / name).read_text(errors='surrogateescape'))
    with contextlib.suppress(OSError):
        picture.add(pid, 'file', 'auxv', (proc / 'auxv').read_bytes().hex())
        # "/autogroup-NUMBER nice NICE": each session gets a new number
        picture.add(pid, 'file', 'autogroup', (proc / 'autogroup').read_text().partition(' ')[2])
    for line in _lines(proc / 'ksm_stat'):
        name, _, value = line.partition(':')
        if name in ('ksm_merge_any', 'ksm_mergeable'):
            picture.add(pid, 'ksm_stat', name, value.strip())
    for line in _lines(proc / 'limits'):
        picture.add(pid, 'limits', line[:25].strip(), ' '.join(line[25:].split()))
    if not moving:
        _add_mappings(picture, pid)
    _add_files(picture, pid, moving)
    tasks = sorted(proc.glob('task/*'))
    own = [task for task in tasks if moving or not _is_kernels(task)]
    for task in own:
        if moving:
            thread = Picture()
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):    # it has ended since
                _add_thread(thread, task, moving)
                # one that is about to has no namespaces any more (kernel/exit.c); a leader stays as a zombie
                if int(task.name) == pid or any(source == 'ns' for _, source, _ in thread.rows):
                    picture.rows.update(thread.rows)
        else:
            _add_thread(picture, task, moving)
            for source, name in (('stat', 'threads'), ('status', 'Threads')):
                picture.add(int(task.name), source, name, str(len(own)))


def _is_kernels(task: Path) -> bool:
    """Whether the kernel has made it for requests of an io_uring (PF_IO_WORKER of <linux/sched.h>)."""
    return bool(int((task / 'stat').read_text(errors='replace').rpartition(')')[2].split()[9 - 3]) & 0x10)


def _add_thread(picture: Picture, task: Path, moving: bool) -> None:
    tid = int(task.name)
    left_out = COUNTERS | MOVING if moving else COUNTERS
    for line in _lines(task / 'status'):
        name, _, value = line.partition(':')
        if name not in left_out:
            picture.add(tid, 'status', name, value.strip())
    fields = (task / 'stat').read_text(errors='replace').rpartition(')')[2].split()
    # proc(5): by the numbers of its table
    for name, number in {'ppid': 4, 'pgrp': 5, 'session': 6, 'tty': 7, 'tpgid': 8, 'nice': 19,
                         'threads': 20, 'start': 22, 'startcode': 26, 'endcode': 27, 'startstack': 28,
                         'exit_signal': 38, 'rt_priority': 40, 'policy': 41, 'start_data': 45, 'end_data': 46,
                         'start_brk': 47, 'arg_start': 48, 'arg_end': 49, 'env_start': 50, 'env_end': 51,
                         'exit_code': 52}.items():
        picture.add(tid, 'stat', name, fields[number - 3])
    picture.add(tid, 'stat', 'flags', f'{int(fields[9 - 3]) & KEPT_FLAGS:#x}')
    with contextlib.suppress(OSError):
        picture.add(tid, 'file', 'timerslack_ns', Path(f'/proc/{tid}/timerslack_ns').read_text())
    with contextlib.suppress(OSError):
        for link in sorted((task / 'ns').iterdir()):
            picture.add(tid, 'ns', link.name, str(link.readlink()))
    if not moving:
        with contextlib.suppress(OSError):
            picture.add(tid, 'file', 'syscall', (task / 'syscall').read_text().split()[0])


def _add_mappings(picture: Picture, pid: int) -> None:
    name = resident = ''
    policies = dict(line.split(' ')[:2] for line in _lines(Path(f'/proc/{pid}/numa_maps')))
    for line in _lines(Path(f'/proc/{pid}/smaps')):
        if re.match('[0-9a-f]+-[0-9a-f]+ ', line):
            name, _, rest = line.partition(' ')
            picture.add(pid, 'maps', name, ' '.join(rest.split()))
            picture.add(pid, 'maps policy', name, policies.get(name.partition('-')[0], ''))
        elif line.startswith('VmFlags:'):
            flags = set(line.split()[1:]) - KERNELS_OWN
            if 'mw' not in flags:       # set or not by how the file was open, and of no effect (mm/mmap.c, do_mmap)
                flags -= {'sh'}
            picture.add(pid, 'maps flags', name, ' '.join(sorted(flags)))
            # Which pages are there depends on what was touched, if they are locked on fault. Pages of a file are
            # divided among all who map them (Pss).
            if 'lf' in flags or picture.rows[pid, 'maps', name].split()[3] != '0':
                picture.rows.pop((pid, 'maps Locked', name))
        elif line.startswith('Rss:'):
            resident = line.split()[1]
        elif line.startswith('Locked:'):
            # pages that are shared are divided among all who share them
            picture.add(pid, 'maps Locked', name, resident if line.split()[1] != '0' else '0')
        elif line.startswith(('ProtectionKey:', 'KernelPageSize:')):
            picture.add(pid, f'maps {line.partition(":")[0]}', name, line.split()[1])


def _add_files(picture: Picture, pid: int, moving: bool) -> None:
    with contextlib.suppress(OSError):
        for entry in sorted(Path(f'/proc/{pid}/fd').iterdir()):
            with contextlib.suppress(FileNotFoundError):
                link = entry.readlink()
                picture.add(pid, 'fd', entry.name, str(link))
                for line in _lines(Path(f'/proc/{pid}/fdinfo/{entry.name}')):
                    name, _, value = line.partition(':')
                    if name == 'tfd':       # a row for each file that an epoll watches, in no order
                        name, value = f'tfd {" ".join(value.split()[:5])}', ''
                    elif name == 'inotify wd':      # a row for each watch
                        number, _, value = value.partition(' ')
                        name = f'inotify {number}'
                    elif name == 'fanotify ino':    # a row for each mark
                        number, _, value = value.partition(' ')
                        name = f'fanotify {number}'
                    if not (moving and name == 'pos') and name not in FILES_OWN:
                        picture.add(pid, f'fd {entry.name}', name, value.strip())


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(errors='surrogateescape').splitlines()
    return []
