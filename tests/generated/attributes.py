# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on the attributes of tasks: settings, signals, timers, limits, scheduling, credentials, ids."""

import struct

from hypothesis import strategies as st

from tests.generated.programs import Program, operation

# Values for which nothing happens while the program waits: no timer expires, no signal that would end it is delivered.
LATE = 1000                     # seconds
BLOCKED = (10, 12, 23, 28, 34, 35, 64)          # signals that are blocked before they are sent
TIMER_SIGNALS = (10, 12, 35)
CAPABILITIES = st.sampled_from([0, 1, 10, 13, 21, 24, 38, 40])
IDS = st.sampled_from([0, 1, 65534, 61001])

PRCTLS = (
    [(1, value) for value in (0, 1, 15, 64)]                    # PR_SET_PDEATHSIG
    + [(4, value) for value in (0, 1)]                          # PR_SET_DUMPABLE
    + [(8, value) for value in (0, 1)]                          # PR_SET_KEEPCAPS
    + [(13, 0), (26, 1), (26, 2)]                               # PR_SET_TIMING, PR_SET_TSC
    + [(29, value) for value in (0, 1, 12345, 2**40)]           # PR_SET_TIMERSLACK
    + [(33, 1, value) for value in (0, 1, 2)] + [(33, 0, 0)]    # PR_MCE_KILL
    + [(36, value) for value in (0, 1, 5)]                      # PR_SET_CHILD_SUBREAPER
    + [(38, 1)]                                                 # PR_SET_NO_NEW_PRIVS
    + [(41, *values) for values in ((0, 0), (1, 0), (1, 2))]    # PR_SET_THP_DISABLE
    + [(53, which, value) for which in (0, 1, 2) for value in (2, 4, 8, 16)]        # PR_SET_SPECULATION_CTRL
    + [(57, value) for value in (0, 1)]                         # PR_SET_IO_FLUSHER
    + [(65, value) for value in (1, 3)]                         # PR_SET_MDWE
    + [(67, value) for value in (0, 1)]                         # PR_SET_MEMORY_MERGE
    + [(78, 1, value) for value in (0, 2, 16)]                  # PR_FUTEX_HASH
    + [(72, value) for value in (0, 1)]                         # PR_SET_... of other machines: EINVAL
)
# PR_SET_MM: the fields of struct prctl_mm_map; their values lie in the window of memory.py or beside what they were
MM_FIELDS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 10, 11])


@operation(arguments=st.sampled_from(PRCTLS))
def set_prctl(program: Program, arguments: tuple[int, ...]) -> None:
    program.call('prctl', *arguments, *[0] * (5 - len(arguments)))


@operation(field=MM_FIELDS, address=st.integers(0, 47))
def set_mm_field(program: Program, field: int, address: int) -> None:
    program.call('prctl', 35, field, 0x10000000000 + address * 4096 + 16, 0, 0)


@operation(name=st.sampled_from([b'', b'name with ) (', b'\xff\xfe', b'line\nbreak', b'0123456789abcdef']))
def set_name(program: Program, name: bytes) -> None:
    program.call('prctl', 15, name + b'\0', 0, 0, 0)


@operation(code=st.sampled_from([(0x1012, 1), (0x1023, 18), (0x1023, 17), (0x4002, 6), (0x4002, 0)]))
def set_arch_prctl(program: Program, code: tuple[int, int]) -> None:
    """ARCH_SET_CPUID (to what it is), ARCH_REQ_XCOMP_PERM, ARCH_ENABLE_TAGGED_ADDR."""
    program.call('arch_prctl', *code)


@operation(persona=st.sampled_from([0x0040000, 0x0080000, 0x0100000, 0x0200000, 0x0400000, 0x0800000, 0x1000000,
                                    0x2000000, 0x4000000, 0x8000000, 0x20000, 0]))
def set_personality(program: Program, persona: int) -> None:
    program.call('personality', persona)


@operation(mask=st.sampled_from([0, 0o22, 0o77, 0o777]))
def set_umask(program: Program, mask: int) -> None:
    program.call('umask', mask)


@operation(path=st.sampled_from(['.', 'directory', '/', '/proc/self', 'removed']))
def change_directory(program: Program, path: str) -> None:
    if path == 'removed':
        program.call('mkdir', b'removed\0', 0o700)
        program.call('chdir', b'removed\0')
        program.call('rmdir', b'../removed\0')
    else:
        program.call('chdir', path.encode() + b'\0')


@operation(path=st.sampled_from(['directory', '/']))
def change_root(program: Program, path: str) -> None:
    program.call('chroot', path.encode() + b'\0')


# ---------------------------------------------------------------- files of /proc/self

@operation(name_value=st.sampled_from([
    ('oom_score_adj', '500'), ('oom_score_adj', '-1000'), ('coredump_filter', '0x1'), ('coredump_filter', '0xff'),
    ('timerslack_ns', '77777'), ('autogroup', '5'), ('comm', 'written'), ('loginuid', '1234'), ('clear_refs', '4'),
    ('make-it-fail', '1'), ('sched', '0')]))
def write_proc(program: Program, name_value: tuple[str, str]) -> None:
    name, value = name_value
    file = program.call('open', f'/proc/self/{name}'.encode() + b'\0', 1)
    program.call('write', file, value.encode(), len(value))
    program.call('close', file)


# ---------------------------------------------------------------- signals

@operation(signal=st.sampled_from([1, 2, 5, 10, 11, 12, 13, 15, 17, 18, 20, 28, 32, 33, 34, 64]),
           handler=st.sampled_from(['0', '1', 'H']),
           flags=st.sets(st.sampled_from([1, 2, 4, 0x08000000, 0x10000000, 0x40000000, 0x80000000, 0x800, 0x400])
                         ).map(sum), mask=st.sampled_from([0, 0x200, 2**64 - 1]))
def set_action(program: Program, signal: int, handler: str, flags: int, mask: int) -> None:
    """SA_NOCLDSTOP, NOCLDWAIT, SIGINFO, ONSTACK, RESTART, NODEFER, RESETHAND, EXPOSE_TAGBITS, UNSUPPORTED."""
    words = struct.pack('<QQQ', flags, 0, mask)
    # the address of a handler is known to the program only
    action = f'H{bytes(8).hex()}{words.hex()}' if handler == 'H' else struct.pack('<Q', int(handler)) + words
    program.call('rt_sigaction', signal, action, 0, 8)


@operation(mask=st.sampled_from([0, 1 << 9, 1 << 33, 2**64 - 1, 0x7ffbbefff]))
def set_mask(program: Program, mask: int) -> None:
    program.call('rt_sigprocmask', 0, struct.pack('<Q', mask), 0, 8)


@operation(signal=st.sampled_from(BLOCKED), how=st.sampled_from(['kill', 'tgkill', 'queue', 'queue thread', 'twice']),
           value=st.integers(0, 2**64 - 1))
def pend(program: Program, signal: int, how: str, value: int) -> None:
    program.call('rt_sigprocmask', 0, struct.pack('<Q', 1 << signal - 1), 0, 8)
    info = struct.pack('<iiiiiiQ', signal, 0, -1, 0, 7, 8, value).ljust(128, b'\0')
    for _ in range(2 if how == 'twice' else 1):
        match how:
            case 'tgkill':
                program.call('tgkill', 'P', 'T', signal)
            case 'queue' | 'twice':
                program.call('rt_sigqueueinfo', 'P', signal, info)
            case 'queue thread':
                program.call('rt_tgsigqueueinfo', 'P', 'T', signal, info)
            case _:
                program.call('kill', 'P', signal)


@operation(flags=st.sampled_from([0, 2, 0x80000000, 0x80000002]), address=st.integers(0, 47),
           size=st.sampled_from([2048, 8192, 100]))
def set_alternate_stack(program: Program, flags: int, address: int, size: int) -> None:
    """SS_DISABLE, SS_AUTODISARM."""
    program.call('sigaltstack', struct.pack('<QIIQ', 0x10000000000 + address * 4096, flags, 0, size), 0)


# ---------------------------------------------------------------- timers

@operation(which=st.integers(0, 2), interval=st.sampled_from([0, 1, 5000]))
def set_interval_timer(program: Program, which: int, interval: int) -> None:
    program.call('setitimer', which, struct.pack('<4q', interval, 1, LATE, 5), 0)


@operation(clock=st.sampled_from([0, 1, 2, 3, 7, 8, 9, 11]), notify=st.sampled_from([0, 1, 4]),
           signal=st.sampled_from(TIMER_SIGNALS), value=st.integers(0, 2**64 - 1), armed=st.booleans(),
           interval=st.sampled_from([0, 3]))
def make_timer(program: Program, clock: int, notify: int, signal: int, value: int, armed: bool, interval: int) -> None:
    """SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD_ID of the thread itself."""
    event = struct.pack('<Qii', value, signal, notify).ljust(64, b'\0')
    program.call('timer_create', clock, f'T{event.hex()}', '@8')
    program.timers.append(program.buffer(0))
    if armed:
        program.call('timer_settime', program.timers[-1], 0, struct.pack('<4q', interval, 0, LATE, 7), 0)


@operation(number=st.integers(0, 9))
def delete_timer(program: Program, number: int) -> None:
    if program.timers:
        program.call('timer_delete', program.timers[number % len(program.timers)])


# ---------------------------------------------------------------- limits and scheduling

@operation(which=st.integers(0, 15).filter(lambda which: which not in (0, 1, 2, 3, 7, 9)),
           soft=st.sampled_from([0, 4096, 65536, 10**6]), hard=st.sampled_from([10**6, 2**64 - 1]))
def set_limit(program: Program, which: int, soft: int, hard: int) -> None:
    """All but those that would end the program, or make its reports fail."""
    program.call('prlimit64', 0, which, struct.pack('<QQ', soft, hard), 0)


@operation(which=st.sampled_from([0, 1, 3, 7, 9]), soft=st.sampled_from([10**9, 2**40]), files=st.integers(300, 400))
def set_high_limit(program: Program, which: int, soft: int, files: int) -> None:
    values = (files, 4096) if which == 7 else (soft, 2**63)
    program.call('prlimit64', 0, which, struct.pack('<QQ', *values), 0)


@operation(policy=st.sampled_from([0, 1, 2, 3, 5, 6, 7]), flags=st.sampled_from([0, 1, 2, 4, 0x18]),
           nice=st.integers(-20, 19), priority=st.sampled_from([0, 1, 50]),
           runtime=st.sampled_from([0, 1_000_000, 100_000]))
def set_scheduling(program: Program, policy: int, flags: int, nice: int, priority: int, runtime: int) -> None:
    deadline = (10_000_000, 20_000_000, 30_000_000) if policy == 6 else (runtime, 0, 0)
    program.call('sched_setattr', 0, struct.pack('<IIQiIQQQII', 56, policy, flags, nice, priority, *deadline, 0, 0), 0)


@operation(nice=st.integers(-20, 19), who=st.sampled_from([0, 1]))
def set_nice(program: Program, nice: int, who: int) -> None:
    program.call('setpriority', who, 0, nice)


@operation(cpus=st.sampled_from([1, 2, 3]))
def set_affinity(program: Program, cpus: int) -> None:
    program.call('sched_setaffinity', 0, 8, struct.pack('<Q', cpus))


@operation(level=st.integers(0, 7), sort=st.integers(0, 3), hint=st.integers(0, 3))
def set_io_priority(program: Program, level: int, sort: int, hint: int) -> None:
    program.call('ioprio_set', 1, 0, sort << 13 | hint << 3 | level)


# ---------------------------------------------------------------- ids and rights

@operation(call=st.sampled_from(['setresuid', 'setresgid']), real=IDS, effective=IDS, saved=IDS)
def set_ids(program: Program, call: str, real: int, effective: int, saved: int) -> None:
    program.call(call, real, effective, saved)


@operation(call=st.sampled_from(['setfsuid', 'setfsgid']), number=IDS)
def set_file_id(program: Program, call: str, number: int) -> None:
    program.call(call, number)


@operation(groups=st.lists(IDS, max_size=3))
def set_groups(program: Program, groups: list[int]) -> None:
    program.call('setgroups', len(groups), struct.pack(f'<{len(groups)}I', *groups) or b'\0')


@operation(bits=st.integers(0, 0xff))
def set_securebits(program: Program, bits: int) -> None:
    program.call('prctl', 28, bits, 0, 0, 0)


@operation(capability=CAPABILITIES)
def drop_from_bounding_set(program: Program, capability: int) -> None:
    program.call('prctl', 24, capability, 0, 0, 0)


@operation(effective=st.integers(0, 2**41 - 1), permitted=st.sampled_from([2**41 - 1, 2**30 - 1]),
           inheritable=st.sampled_from([0, 1, 2**41 - 1]), ambient=CAPABILITIES)
def set_capabilities(program: Program, effective: int, permitted: int, inheritable: int, ambient: int) -> None:
    low = 2**32 - 1
    sets = (effective & permitted, permitted, inheritable)
    program.call('capset', struct.pack('<Ii', 0x20080522, 0),
                 struct.pack('<6I', *(one & low for one in sets), *(one >> 32 for one in sets)))
    program.call('prctl', 47, 2, ambient, 0, 0)


@operation(call=st.sampled_from(['setpgid', 'setsid']), child=st.integers(0, 5))
def lead_group(program: Program, call: str, child: int) -> None:
    if call == 'setsid':
        program.call('setsid')
    else:
        program.call('setpgid', program.child(child), 0)


# ---------------------------------------------------------------- other state of the kernel

@operation(call=st.sampled_from(['set_robust_list', 'set_tid_address', 'clear rseq']), address=st.integers(0, 40))
def set_address(program: Program, call: str, address: int) -> None:
    at = 0x10000000000 + address * 4096 + 32
    match call:
        case 'set_robust_list':
            program.call('set_robust_list', at, 24)
        case 'set_tid_address':
            program.call('set_tid_address', at)


@operation(command=st.sampled_from([2, 4, 16, 64, 128]))
def register_membarrier(program: Program, command: int) -> None:
    program.call('membarrier', command, 0, 0)


@operation(flags=st.sampled_from([0x200, 0x400, 0x40000, 0x600]))
def unshare(program: Program, flags: int) -> None:
    """CLONE_FS, CLONE_FILES, CLONE_SYSVSEM."""
    program.call('unshare', flags)


@operation(status=st.integers(0, 255), signal=st.sampled_from([0, 9, 11]))
def die(program: Program, status: int, signal: int) -> None:
    """A child that is a zombie."""
    program.lines.append('fork')
    step = f'${len(program.lines) - 1}'
    if signal:
        program.call('kill', 'P', signal)
    program.call('exit_group', status)
    program.lines.append('end')
    program.children.append(step)


@operation(keyring=st.sampled_from([-1, -2, -3]), name=st.sampled_from([b'user', b'keyring']))
def add_key(program: Program, keyring: int, name: bytes) -> None:
    """A key in the keyring of the thread, the process or the session, which is a new one."""
    if keyring == -3:
        program.call('keyctl', 1, 0)
    program.call('add_key', name + b'\0', b'key\0', b'payload' if name == b'user' else 0,
                 7 if name == b'user' else 0, keyring)
