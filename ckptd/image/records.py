# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every record of an image. Drawn by part; the order inside a part is the order of the dump.

    tree.img    Header, Namespaces, TaskIds (chunks of 256), Task per task in depth-first order
    tasks.img   Credentials, Scheduling, Registers, ThreadSignals, ThreadPointers per task, SleepLeft of those that
                slept in a system call; ProcessState, Limits, IntervalTimers, PosixTimers per process; SignalActions,
                Fs per object; TaskAttribute per attribute of any of these that differs from a new task's
    files.img   OpenFile per file description, FdTable per table
    memory.img  Mm, Vma, PageRuns per address space; SharedMemory and its PageRuns per object; Backing per mapped file
    data-N.img  page-aligned bytes, no records: page data and the content of deleted files and pipes

Ids (mm_id, files_id, ...) count from 1 inside an image; 0 means none. All ids of tasks are vpids, as the root's pid
namespace has them; 0 where the task is outside of it. Addresses, sizes and masks are the kernel's own numbers.
A negative kernel number is stored as its unsigned two's complement of the field's width.
"""

from ckptd.image.grammar import U8, U16, U32, U64, Record, Struct, layout, record

CHUNK = 256             # tasks per TaskIds record, as in Linux-CR
PAGE = 4096

# four-letter code of a part: its file. A record's part is the high byte of its tag: 0 tree, 1 tasks, 2 files, 3 memory
PARTS = {'TREE': 'tree.img', 'TASK': 'tasks.img', 'FILE': 'files.img', 'MEM ': 'memory.img'}


def data_name(part: int) -> str:
    """File name of a data part."""
    return f'data-{part}.img'


@layout
class Extent(Struct):
    """Bytes of data-<part>.img: `length` bytes at `offset` (a multiple of PAGE)."""
    part: U16
    offset: U64
    length: U64


# ---------------------------------------------------------------- tree.img

@record(0x0001)
class Header(Record):
    """root: vpid of the first root. realtime: nanoseconds at the moment of the dump; the manifest has other clocks."""
    root: U32
    tasks: U32
    processes: U32
    realtime: U64
    page_size: U32
    machine: str


@record(0x0002)
class TaskIds(Record):
    """Up to 256 tasks, five parallel lists."""
    vpid: tuple[U32, ...]
    vtgid: tuple[U32, ...]
    vppid: tuple[U32, ...]
    vpgid: tuple[U32, ...]
    vsid: tuple[U32, ...]


@record(0x0003)
class TaskRecord(Record):
    """parent: vpid of the thread that created it (its parent's thread), 0 for a root.
    state: letter of /proc/PID/stat as a number; stop_signal: of a task in job-control stop, else 0.
    exit_code: wait(2) status of a zombie; of a process in job-control stop the signal, until its parent has waited for
    it. pf_flags: PF_* of /proc/PID/stat."""
    vpid: U32
    parent: U32
    comm: str
    state: U8
    exit_code: U32
    exit_signal: U32
    stop_signal: U32
    pf_flags: U64
    mm_id: U32
    files_id: U32
    fs_id: U32
    sighand_id: U32
    cgroup: str


@layout
class Namespace(Struct):
    """name: of the link in /proc/PID/ns. own: 1 where it is that of the machine's first process,
    or of the one who dumped."""
    name: str
    inode: U64
    own: U8


@record(0x0004, optional=True)
class Namespaces(Record):
    """Namespaces of the first root, which all other tasks share. A restart has to make those that are not `own`."""
    namespaces: tuple[Namespace, ...]

    @property
    def own_pidns(self) -> bool:
        """Whether the tree lived in a pid namespace of its own."""
        return any(one.name == 'pid' and not one.own for one in self.namespaces)


# ---------------------------------------------------------------- tasks.img

@record(0x0101)
class Credentials(Record):
    """uids, gids: real, effective, saved, file system. capabilities: inheritable, permitted, effective, bounding,
    ambient."""
    vpid: U32
    uids: tuple[U32, ...]
    gids: tuple[U32, ...]
    groups: tuple[U32, ...]
    capabilities: tuple[U64, ...]
    securebits: U32
    no_new_privs: U8
    keepcaps: U8


@record(0x0102)
class Scheduling(Record):
    """sched_getattr(2) and friends. nice: 0..39 (nice value + 20). affinity: CPU bit mask, little-endian bytes.
    timer_slack in nanoseconds. ioprio: ioprio_get(2). util_min, util_max: utilisation clamps, of 1024."""
    vpid: U32
    policy: U32
    flags: U64
    nice: U8
    priority: U32
    runtime: U64
    deadline: U64
    period: U64
    affinity: bytes
    ioprio: U32
    timer_slack: U64
    util_min: U32 = 0
    util_max: U32 = 0


@record(0x0103)
class Registers(Record):
    """gpr: struct user_regs_struct. xstate: NT_X86_XSTATE regset (XSAVE, standard format). machine: EM_* of <elf.h>."""
    vpid: U32
    machine: U16
    gpr: bytes
    xstate: bytes


@record(0x0104)
class ThreadSignals(Record):
    """mask: blocked signals, bit n-1 = signal n. pending: siginfo_t of 128 bytes each, in queue order."""
    vpid: U32
    mask: U64
    altstack_sp: U64
    altstack_flags: U32
    altstack_size: U64
    pending: tuple[bytes, ...]


@record(0x0105)
class ThreadPointers(Record):
    """Addresses that the kernel keeps for a thread."""
    vpid: U32
    clear_child_tid: U64
    robust_list: U64
    robust_list_len: U64
    rseq: U64
    rseq_len: U32
    rseq_signature: U32
    rseq_flags: U32
    pdeath_signal: U32


# SleepLeft.left_ns: the call has no end, or one that stands in its arguments as a point in time
ENDLESS = 2**64 - 1


@record(0x0106)
class SleepLeft(Record):
    """A system call that was interrupted in the middle of a wait, of which the kernel keeps the end in a place that
    dies with the task: the restart block (rax of Registers is -516, ERESTART_RESTARTBLOCK), or nowhere.

    number: of the system call that the program made; orig_rax may say 219, restart_syscall. The argument registers are
    those of that call. left_ns: nanoseconds from the clocks of Header to its end; 0 if that was past; or ENDLESS.
    clock: CLOCK_* that the end was counted on. exact: 0 where the end could only be bounded: left_ns is then at most
    too long, never longer than the whole timeout.

    A restart, before it lets the task go, for rax -516: ENDLESS: issue call `number` with its arguments as they are
    (rax = number, rip - 2). Else have the task issue `number` by a remote call with the same arguments but a timeout of
    left_ns, in memory of its own where the timeout is a pointer (nanosleep rdi, clock_nanosleep rdx, futex r10; poll:
    milliseconds in edx, rounded up), interrupt it there (PTRACE_INTERRUPT), and set Registers with rax = -516: the new
    restart block then has the right end, and the address for the remaining time that the program gave. Where that call
    ends before it is interrupted, its result is what the task gets, in rax.
    For other values of rax (a call that Registers issues again, see ckptd.dump.resume): the timeout in the arguments
    is the whole one, except where it is a register (epoll_wait, epoll_pwait: r10), which has the rest already; exact is
    then to some milliseconds.
    """
    vpid: U32
    number: U32
    left_ns: U64
    clock: U32
    exact: U8


@record(0x0108)
class TaskAttribute(Record):
    """An attribute that no other record has, where it is not that of a new task. owner: vpid, mm_id, sighand_id or
    fs_id, by scope: Scope of ckptd.objects.attributes.base. name: of the class in ckptd.objects.attributes that wrote
    `data` and reads it back."""
    owner: U32
    scope: U8
    name: str
    data: bytes


@record(0x0110)
class ProcessState(Record):
    """oom_score_adj: 0..2000 (value + 1000). shared_pending: siginfo_t of 128 bytes each.
    tty: device number of the controlling terminal, 0 for none; tpgid: its foreground group as a vpid."""
    vpid: U32
    personality: U32
    oom_score_adj: U16
    shared_pending: tuple[bytes, ...]
    tty: U32
    tpgid: U32


@layout
class Limit(Struct):
    """RLIM_INFINITY is 2**64 - 1."""
    soft: U64
    hard: U64


@record(0x0111)
class Limits(Record):
    """Resource limits by number, RLIMIT_CPU (0) to RLIMIT_RTTIME (15)."""
    vpid: U32
    limits: tuple[Limit, ...]


@layout
class IntervalTimer(Struct):
    """Microseconds."""
    interval: U64
    value: U64


@record(0x0112)
class IntervalTimers(Record):
    """ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF."""
    vpid: U32
    timers: tuple[IntervalTimer, ...]


@layout
class PosixTimer(Struct):
    """clock: clockid_t as u32. notify: SIGEV_* (| 4 with a thread). vtid: of SIGEV_THREAD_ID, else 0. Nanoseconds."""
    id: U32
    clock: U32
    notify: U32
    signal: U32
    value: U64
    vtid: U32
    interval_ns: U64
    value_ns: U64
    overrun: U32


@record(0x0113)
class PosixTimers(Record):
    vpid: U32
    timers: tuple[PosixTimer, ...]


@layout
class SigAction(Struct):
    """struct kernel_sigaction of x86."""
    handler: U64
    flags: U64
    restorer: U64
    mask: U64


@record(0x0120)
class SignalActions(Record):
    """Actions of a shared signal-handler table: signals 1 to 64; KILL and STOP are default."""
    sighand_id: U32
    actions: tuple[SigAction, ...]


@record(0x0121)
class Fs(Record):
    """Root, working directory and umask of a shared fs struct."""
    fs_id: U32
    cwd: str
    root: str
    umask: U16


# ---------------------------------------------------------------- files.img

@record(0x0201)
class SavedFile(Record):
    """An open file description. kind: tag of the class in ckptd.objects.files that wrote `data` and reads it back.
    flags: O_* as in fdinfo, without O_CLOEXEC. link: what /proc/PID/fd shows, for people.
    owner: fcntl F_GETOWN_EX, type (F_OWNER_*) and vpid; owner_signal: F_GETSIG; owner_uid, owner_euid: whose rights
    decide whether the signal may be sent."""
    file_id: U32
    kind: str
    flags: U32
    position: U64
    mode: U32
    owner_type: U32
    owner: U32
    owner_signal: U32
    link: str
    data: bytes
    owner_uid: U32 = 0
    owner_euid: U32 = 0


@layout
class Fd(Struct):
    fd: U32
    file_id: U32
    cloexec: U8


@record(0x0202)
class FdTable(Record):
    """The fds of a shared table."""
    files_id: U32
    fds: tuple[Fd, ...]


# ---------------------------------------------------------------- memory.img

@record(0x0301)
class Mm(Record):
    """layout: start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end, env_start,
    env_end (struct prctl_mm_map). exe: backing_id of the executable. auxv: as /proc/PID/auxv. lock_future: mlockall(2),
    1 MCL_FUTURE, 2 with MCL_ONFAULT. pkeys: protection keys that are allocated, pkey_alloc(2), bit n is key n."""
    mm_id: U32
    layout: tuple[U64, ...]
    auxv: bytes
    exe: U32
    dumpable: U8
    lock_future: U8 = 0
    pkeys: U16 = 0


# Vma.kind. Pages of a VDSO are in the image as those of ANON are: another kernel's would not fit its callers
ANON, STACK, FILE_PRIVATE, FILE_SHARED, SHARED_MEMORY, VDSO, VVAR, VSYSCALL, HEAP = range(1, 10)


@record(0x0302)
class Vma(Record):
    """protection: PROT_*. flags: MAP_* that make it again. vm_flags: two-letter codes of smaps, a space between.
    offset: bytes into the object. object: backing_id or shm_id by kind. name: of PR_SET_VMA_ANON_NAME, or as in maps.
    locked: 0 no, 1 mlock, 2 on fault. pkey: protection key, pkeys(7)."""
    mm_id: U32
    start: U64
    end: U64
    protection: U32
    flags: U32
    kind: U8
    offset: U64
    object: U32
    locked: U8
    vm_flags: str
    name: str
    pkey: U8 = 0


@layout
class PageRun(Struct):
    """`pages` pages from address (in a shared object: byte offset) `start`, at byte `offset` of data-<part>.img."""
    start: U64
    pages: U32
    part: U16
    offset: U64


# PageRuns.owner_kind
OF_MM, OF_SHARED_MEMORY = 1, 2


@record(0x0303)
class PageRuns(Record):
    """Ascending by start; what no run names was absent or zero (or, in a private file mapping, is as in the file)."""
    owner_kind: U8
    owner: U32
    runs: tuple[PageRun, ...]


@layout
class Range(Struct):
    start: U64
    end: U64


@record(0x0304)
class GuardRegions(Record):
    """madvise(MADV_GUARD_INSTALL) ranges."""
    mm_id: U32
    ranges: tuple[Range, ...]


# SharedMemory.kind
SHMEM, MEMFD, SYSV = 1, 2, 3


@record(0x0305)
class SharedMemory(Record):
    """A shared object whose content is in the image, once. seals, name: of a memfd. key, shmid: of a SysV segment."""
    shm_id: U32
    kind: U8
    size: U64
    name: str
    seals: U32
    mode: U32
    uid: U32
    gid: U32
    key: U32
    shmid: U32


@record(0x0306)
class Backing(Record):
    """A mapped file or an executable, by path. device, inode: st_dev and st_ino of the file itself. mtime in
    nanoseconds. deleted: the path is gone or another file's. content: of a deleted file, and of a small one that is
    written through the mapping: its bytes from 0 on, all but the last extent whole pages."""
    backing_id: U32
    path: str
    device: U64
    inode: U64
    size: U64
    mtime: U64
    mode: U32
    deleted: U8
    content: tuple[Extent, ...]
