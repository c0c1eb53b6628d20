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
from dataclasses import dataclass, field
from pathlib import Path

# lines of /proc/PID/status that are counters, or say what another task does at the moment
COUNTERS = frozenset({'VmPeak', 'VmHWM', 'VmRSS', 'RssAnon', 'RssFile', 'RssShmem', 'VmSwap', 'VmPTE',
                      'voluntary_ctxt_switches', 'nonvoluntary_ctxt_switches', 'THP_enabled', 'SigQ'})
MOVING = frozenset({'State', 'SigPnd', 'ShdPnd', 'SigBlk', 'VmSize', 'VmData', 'VmStk', 'VmLck'})
# of a timerfd the time that is left; the number of an eventfd
FILES_OWN = frozenset({'it_value', 'eventfd-id'})
# names of the smaps flags that the kernel sets by itself: soft-dirty
KERNELS_OWN = {'sd'}


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


def _add_process(picture: Picture, pid: int, moving: bool) -> None:
    proc = Path(f'/proc/{pid}')
    for name in ('exe', 'cwd', 'root'):
        with contextlib.suppress(OSError):      # a zombie has none
            picture.add(pid, 'link', name, str((proc / name).readlink()))
    for name in ('cmdline', 'oom_score_adj', 'loginuid', 'cgroup', 'timers', 'personality', 'coredump_filter'):
        with contextlib.suppress(OSError):
            picture.add(pid, 'file', name, (proc / name).read_text(errors='surrogateescape'))
    for line in _lines(proc / 'limits'):
        picture.add(pid, 'limits', line[:25].strip(), ' '.join(line[25:].split()))
    if not moving:
        _add_mappings(picture, pid)
    _add_files(picture, pid, moving)
    for task in sorted(proc.glob('task/*')):
        if moving:
            thread = Picture()
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):    # it has ended since
                _add_thread(thread, task, moving)
                # one that is about to has no namespaces any more (kernel/exit.c); a leader stays as a zombie
                if int(task.name) == pid or any(source == 'ns' for _, source, _ in thread.rows):
                    picture.rows.update(thread.rows)
        else:
            _add_thread(picture, task, moving)


def _add_thread(picture: Picture, task: Path, moving: bool) -> None:
    tid = int(task.name)
    left_out = COUNTERS | MOVING if moving else COUNTERS
    for line in _lines(task / 'status'):
        name, _, value = line.partition(':')
        if name not in left_out:
            picture.add(tid, 'status', name, value.strip())
    fields = (task / 'stat').read_text(errors='replace').rpartition(')')[2].split()
    # proc(5): exit_signal, rt_priority, policy, nice, number of threads, start time
    for name, number in {'ppid': 4, 'pgrp': 5, 'session': 6, 'tty': 7, 'nice': 19, 'threads': 20, 'start': 22,
                         'exit_signal': 38, 'rt_priority': 40, 'policy': 41, 'exit_code': 52}.items():
        picture.add(tid, 'stat', name, fields[number - 3])
    with contextlib.suppress(OSError):
        for link in sorted((task / 'ns').iterdir()):
            picture.add(tid, 'ns', link.name, str(link.readlink()))
    if not moving:
        with contextlib.suppress(OSError):
            picture.add(tid, 'file', 'syscall', (task / 'syscall').read_text().split()[0])


def _add_mappings(picture: Picture, pid: int) -> None:
    name = ''
    for line in _lines(Path(f'/proc/{pid}/smaps')):
        if re.match('[0-9a-f]+-[0-9a-f]+ ', line):
            name, _, rest = line.partition(' ')
            picture.add(pid, 'maps', name, ' '.join(rest.split()))
        elif line.startswith('VmFlags:'):
            flags = set(line.split()[1:]) - KERNELS_OWN
            picture.add(pid, 'maps flags', name, ' '.join(sorted(flags)))
        elif line.startswith('Locked:'):
            picture.add(pid, 'maps locked', name, line.split()[1])


def _add_files(picture: Picture, pid: int, moving: bool) -> None:
    with contextlib.suppress(OSError):
        for entry in sorted(Path(f'/proc/{pid}/fd').iterdir()):
            with contextlib.suppress(FileNotFoundError):
                picture.add(pid, 'fd', entry.name, str(entry.readlink()))
                for line in _lines(Path(f'/proc/{pid}/fdinfo/{entry.name}')):
                    name, _, value = line.partition(':')
                    if name == 'tfd':       # a row for each file that an epoll watches, in no order
                        name, value = f'tfd {" ".join(value.split()[:5])}', ''
                    elif name == 'inotify wd':      # a row for each watch
                        number, _, value = value.partition(' ')
                        name = f'inotify {number}'
                    if not (moving and name == 'pos') and name not in FILES_OWN:
                        picture.add(pid, f'fd {entry.name}', name, value.strip())


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(errors='surrogateescape').splitlines()
    return []
