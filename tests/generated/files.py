# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on open files."""

import os
import struct
from functools import reduce
from operator import or_

from hypothesis import strategies as st

from tests.generated.programs import Program, operation

number = st.integers(0, 30)
O_CLOEXEC, O_CREAT, O_PATH = 0o2000000, 0o100, 0o10000000
# O_APPEND, O_NONBLOCK, O_DSYNC, O_SYNC, O_DIRECT, O_LARGEFILE, O_NOATIME, O_CLOEXEC, O_NOFOLLOW
open_flags = st.sets(st.sampled_from([0o2000, 0o4000, 0o10000, 0o4010000, 0o40000, 0o100000, 0o1000000, O_CLOEXEC,
                                      0o400000]), max_size=3).map(lambda flags: reduce(or_, flags, 0))
# made by trial.py
PATHS = ('file', 'other', 'fifo', 'directory', '.', 'link', '/dev/null', '/dev/zero', '/dev/urandom',
         '/proc/self/status', '/proc/self/maps', '/proc/uptime', '/proc/self', '/etc/passwd')
SECONDS = 1000
# of this process: it has a name that the machine knows, and trial.py removes it
QUEUE = f'ckptd-generated-{os.getpid()}'


@operation(path=st.sampled_from(PATHS), mode=st.sampled_from([0, 2, 1]), flags=open_flags)
def open_file(program: Program, path: str, mode: int, flags: int) -> None:
    if path == 'fifo':
        mode = 2            # else it would wait
    elif path.startswith('/etc'):
        mode = 0
    program.add_file(program.call('open', path.encode() + b'\0', mode | flags, 0), is_shared=path.startswith('/'))


@operation(path=st.sampled_from(PATHS), flags=st.sampled_from([0, 0o400000, O_CLOEXEC]))
def open_path(program: Program, path: str, flags: int) -> None:
    program.add_file(program.call('open', path.encode() + b'\0', O_PATH | flags, 0))


@operation(name=st.sampled_from(['new', 'newer']), flags=open_flags, gone=st.sampled_from(['no', 'unlink', 'rename']),
           mode=st.sampled_from([0o600, 0o4755, 0o1000]))
def make_file(program: Program, name: str, flags: int, gone: str, mode: int) -> None:
    program.add_file(program.call('open', name.encode() + b'\0', O_CREAT | 2 | flags, mode))
    if gone == 'unlink':
        program.call('unlink', name.encode() + b'\0')
    elif gone == 'rename':
        program.call('rename', name.encode() + b'\0', b'renamed\0')


@operation(flags=st.sampled_from([2, 1, 0o2002, 0o202]))
def make_nameless(program: Program, flags: int) -> None:
    """O_TMPFILE, also with O_EXCL."""
    program.add_file(program.call('open', b'.\0', 0o20200000 | flags, 0o600))


@operation(flags=st.sets(st.sampled_from([0o4000, O_CLOEXEC, 0o40000])).map(sum))
def make_pipe(program: Program, flags: int) -> None:
    program.call('pipe2', '@8', flags)
    program.add_file(program.buffer(0), program.buffer(1))


@operation(value=st.sampled_from([0, 1, 2**32 - 2]), flags=st.sets(st.sampled_from([1, 0o4000, O_CLOEXEC])).map(sum))
def make_eventfd(program: Program, value: int, flags: int) -> None:
    program.add_file(program.call('eventfd2', value, flags))


@operation(clock=st.sampled_from([0, 1, 7, 8, 9]), flags=st.sampled_from([0, 0o4000, O_CLOEXEC]),
           setting=st.sampled_from([0, 1, 3]), interval=st.sampled_from([0, 2]), armed=st.booleans())
def make_timerfd(program: Program, clock: int, flags: int, setting: int, interval: int, armed: bool) -> None:
    file = program.call('timerfd_create', clock, flags)
    program.add_file(file)
    if armed:
        value = 2**33 if setting else SECONDS        # TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET
        program.call('timerfd_settime', file, setting, struct.pack('<4q', interval, 5, value, 7), 0)


@operation(mask=st.sampled_from([0, 1 << 9, 2**64 - 1]), flags=st.sampled_from([0, 0o4000, O_CLOEXEC]))
def make_signalfd(program: Program, mask: int, flags: int) -> None:
    program.add_file(program.call('signalfd4', -1, struct.pack('<Q', mask), 8, flags))


@operation(child=st.integers(0, 5), flags=st.sampled_from([0, 0o4000]))
def make_pidfd(program: Program, child: int, flags: int) -> None:
    program.add_file(program.call('pidfd_open', program.child(child), flags))


@operation(flags=st.sampled_from([0, 0o4000, O_CLOEXEC]))
def make_thread_pidfd(program: Program, flags: int) -> None:
    """PIDFD_THREAD, of the caller."""
    program.add_file(program.call('pidfd_open', 'T', 0o200 | flags))


@operation(flags=st.sets(st.sampled_from([1, 2, 8, 0x10])).map(sum), name=st.sampled_from([b'', b'memory', b'a b']),
           size=st.sampled_from([0, 100, 4096, 20000]))
def make_memfd(program: Program, flags: int, name: bytes, size: int) -> None:
    """MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL, MFD_EXEC."""
    file = program.call('memfd_create', name + b'\0', flags)
    program.add_file(file)
    program.call('ftruncate', file, size)


@operation(kind=st.sampled_from([1, 2, 5]), flags=st.sampled_from([0, 0o4000, O_CLOEXEC]))
def make_socketpair(program: Program, kind: int, flags: int) -> None:
    program.call('socketpair', 1, kind | flags, 0, '@8')
    program.add_file(program.buffer(0), program.buffer(1))


@operation(kind=st.sampled_from([1, 2, 5]))
def make_socket(program: Program, kind: int) -> None:
    program.add_file(program.call('socket', 1, kind, 0))


@operation(to=number, events=st.sampled_from([1, 4, 0x2001, 0x80000001, 0x40000004, 0x10000001, 0x20000001]),
           data=st.integers(0, 2**64 - 1), new=st.booleans(), instance=number)
def watch(program: Program, to: int, events: int, data: int, new: bool, instance: int) -> None:
    """EPOLLIN, OUT, RDHUP, ET, ONESHOT, EXCLUSIVE, WAKEUP, on a new epoll or whatever file it is."""
    file = program.call('epoll_create1', 0) if new else program.file(instance)
    program.call('epoll_ctl', file, 1, program.file(to), struct.pack('<IQ', events, data))
    if new:
        program.add_file(file)


@operation(file=number, usecs=st.sampled_from([0, 100]), budget=st.sampled_from([8, 0]), prefer=st.booleans())
def set_epoll_parameters(program: Program, file: int, usecs: int, budget: int, prefer: bool) -> None:
    """EPIOCSPARAMS, since Linux 6.9."""
    program.call('ioctl', program.file(file), 0x40088A01, struct.pack('<IHBB', usecs, budget, prefer, 0))


# ---------------------------------------------------------------- what is done with a file

@operation(file=number, to=st.integers(20, 40), flags=st.sampled_from([0, O_CLOEXEC]))
def duplicate(program: Program, file: int, to: int, flags: int) -> None:
    source = program.file(file)
    program.add_file(program.call('dup3', source, to, flags), is_shared=source in program.shared)


@operation(file=number)
def close(program: Program, file: int) -> None:
    program.call('close', program.file(file))


@operation(file=number, size=st.sampled_from([1, 100, 5000]))
def write(program: Program, file: int, size: int) -> None:
    """Without waiting (RWF_NOWAIT); a file that does not know that is written as usual if it does not wait."""
    file_ = program.file(file)
    flags = program.call('fcntl', file_, 3, 0)
    program.call('fcntl', file_, 4, 0o4000)
    program.call('write', file_, b'text' * 100, min(size, 400))
    program.call('fcntl', file_, 4, flags)


@operation(file=number, size=st.sampled_from([1, 50]))
def read(program: Program, file: int, size: int) -> None:
    file_ = program.file(file)
    flags = program.call('fcntl', file_, 3, 0)
    program.call('fcntl', file_, 4, 0o4000)
    program.call('read', file_, '@512', size)
    program.call('fcntl', file_, 4, flags)


@operation(file=number, position=st.sampled_from([0, 7, 10**6, 2**40]), whence=st.sampled_from([0, 1, 2]))
def seek(program: Program, file: int, position: int, whence: int) -> None:
    program.call('lseek', program.file(file), position, whence)


@operation(file=number, size=st.sampled_from([0, 10, 9000]))
def truncate(program: Program, file: int, size: int) -> None:
    program.call('ftruncate', program.file(file), size)


@operation(file=number, mode=st.sampled_from([0, 1, 3]), offset=st.sampled_from([0, 4096]))
def allocate(program: Program, file: int, mode: int, offset: int) -> None:
    program.call('fallocate', program.file(file), mode, offset, 8192)


@operation(file=number, mode=st.sampled_from([0o600, 0o2755, 0]), owner=st.sampled_from([-1, 0, 61001]))
def change_mode(program: Program, file: int, mode: int, owner: int) -> None:
    changed = program.file(file)
    # An fd may have become another file's: what dup3(2) closes, the next open file gets. So a program that has a file
    # of the machine changes none.
    if not program.shared:
        program.call('fchmod', changed, mode)
        program.call('fchown', changed, owner, -1)


@operation(file=number, command=st.sampled_from([
    (2, 0), (2, 1), (4, 0), (4, 0o4000), (4, 0o2000), (4, 0o20000), (4, 0o26000), (4, 0o1040000), (10, 0), (10, 10),
    (10, 35), (1024, 0), (1024, 1), (1024, 2), (1031, 4096), (1031, 65536), (1031, 1 << 20), (1033, 1), (1033, 2),
    (1033, 4), (1033, 8), (1033, 16), (1033, 32), (8, 0), (1026, 0)]))
def control(program: Program, file: int, command: tuple[int, int]) -> None:
    """fcntl(2): F_SETFD, F_SETFL (with O_ASYNC), F_SETSIG, F_SETLEASE, F_SETPIPE_SZ, F_ADD_SEALS, F_SETOWN."""
    program.call('fcntl', program.file(file), *command)


@operation(file=number, sort=st.integers(0, 2), child=st.integers(0, 5))
def set_owner(program: Program, file: int, sort: int, child: int) -> None:
    """F_SETOWN_EX of a thread, a process or a group: the caller, or a child."""
    words = struct.pack('<i', sort)
    if child % 2:
        program.call('fcntl', program.file(file), 8, program.child(child))
    else:
        program.call('fcntl', program.file(file), 15, f'O{words.hex()}00000000')


@operation(file=number, command=st.sampled_from([1036, 1038]), hint=st.integers(0, 5))
def set_hint(program: Program, file: int, command: int, hint: int) -> None:
    """F_SET_RW_HINT, F_SET_FILE_RW_HINT."""
    program.call('fcntl', program.file(file), command, struct.pack('<Q', hint))


@operation(file=number, command=st.sampled_from([6, 37]), sort=st.integers(0, 2), start=st.integers(0, 30),
           length=st.sampled_from([0, 5, 10]))
def lock_range(program: Program, file: int, command: int, sort: int, start: int, length: int) -> None:
    """F_SETLK and F_OFD_SETLK of struct flock."""
    program.call('fcntl', program.file(file), command, struct.pack('<hhxxxxqqixxxx', sort, 0, start, length, 0))


@operation(file=number, how=st.sampled_from([5, 6, 12]))
def lock_file(program: Program, file: int, how: int) -> None:
    """flock(2): LOCK_SH, LOCK_EX, LOCK_UN, with LOCK_NB."""
    program.call('flock', program.file(file), how)


@operation(file=number, request=st.sampled_from([0x5421, 0x5452, 0x5450, 0x5451]), value=st.integers(0, 1))
def set_by_ioctl(program: Program, file: int, request: int, value: int) -> None:
    """FIONBIO, FIOASYNC, FIONCLEX, FIOCLEX."""
    program.call('ioctl', program.file(file), request, struct.pack('<i', value))


@operation(file=number, option=st.integers(1, 84), value=st.sampled_from([0, 1, 2, 5000, 100000]))
def set_socket_option(program: Program, file: int, option: int, value: int) -> None:
    # two words: SO_LINGER; timeouts have four
    size = 16 if option in (20, 21, 66, 67) else 8 if option == 13 else 4
    program.call('setsockopt', program.file(file), 1, option, struct.pack('<iiq', value, 0, 0), size)


@operation(file=number, how=st.integers(0, 2))
def shut_down(program: Program, file: int, how: int) -> None:
    program.call('shutdown', program.file(file), how)


@operation(file=number, advice=st.integers(0, 5))
def advise_file(program: Program, file: int, advice: int) -> None:
    """posix_fadvise(2): POSIX_FADV_RANDOM is kept in the description."""
    program.call('fadvise64', program.file(file), 0, 0, advice)


@operation(which=st.sampled_from(['userfaultfd', 'memfd_secret', 'io_setup', 'perf', 'landlock', 'fanotify', 'uring',
                                  'netlink', 'inet', 'mount', 'namespace', 'queue']))
def make_refused(program: Program, which: str) -> None:
    """What a checkpoint refuses."""
    match which:
        case 'userfaultfd':
            program.call('userfaultfd', 0)
        case 'memfd_secret':
            program.call('memfd_secret', 0)
        case 'io_setup':
            program.call('io_setup', 4, '@8')
        case 'perf':
            program.call('perf_event_open', struct.pack('<IIQ', 1, 112, 0).ljust(112, b'\0'), 0, -1, -1, 0)
        case 'landlock':
            program.call('landlock_create_ruleset', struct.pack('<Q', 1), 8, 0)
        case 'fanotify':
            program.call('fanotify_init', 0, 0)
        case 'uring':
            program.call('io_uring_setup', 4, '@512')
        case 'netlink':
            program.call('socket', 16, 3, 0)
        case 'inet':
            program.call('socket', 2, 1, 0)
        case 'mount':
            program.call('open_tree', -100, b'/\0', 1)
        case 'queue':
            program.call('mq_open', f'{QUEUE}\0'.encode(), 0o102, 0o600, 0)
            program.call('mq_unlink', b'ckptd-generated\0')
        case _:
            program.call('open', b'/proc/self/ns/net\0', 0)
