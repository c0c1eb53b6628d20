# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every record of an image, by part. The order inside a part is the order of the dump.

    tree.img    Header, Namespaces, TaskIds (chunks of 256), Task per task in depth-first order; SystemVObject each
    tasks.img   Credentials, Scheduling, Registers, ThreadSignals, ThreadPointers per task, SleepLeft of those that
                slept in a system call; ProcessState, Limits, IntervalTimers, PosixTimers per process; SignalActions,
                Fs per object; TaskAttribute per attribute of any of these that differs from a new task's
    files.img   OpenFile per file description, FdTable per table
    memory.img  Mm, Vma, PageRuns per address space; SharedMemory and its PageRuns per object; Backing per mapped file
    data-N.img  page-aligned bytes, no records: page data and the content of deleted files and pipes

Ids (mm_id, files_id, ...) count from 1 inside an image; 0 means none. All ids of tasks are vpids, as in the root's pid
namespace; 0 for a task outside of it. Addresses, sizes and masks are the kernel's numbers. A negative kernel number is
stored as its unsigned two's complement in the width of the field.
"""

from ckptd.image.grammar import U8, U16, U32, U64, Record, Struct, layout, record

CHUNK = 256             # tasks per TaskIds record, as in Linux-CR
PAGE = 4096

# Four-letter code of a part: its file. The high byte of a record's tag is its part: 0 tree, 1 tasks, 2 files, 3 memory.
PARTS = {'TREE': 'tree.img', 'TASK': 'tasks.img', 'FILE': 'files.img', 'MEM ': 'memory.img'}


def data_name(part: int) -> str:
    """Return the file name of a data part."""
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
    """General facts about the tree. The manifest has further clocks."""
    root: U32    # vpid of the first root
    tasks: U32
    processes: U32
    realtime: U64    # nanoseconds at the moment of the dump
    page_size: U32
    machine: str


@record(0x0002)
class TaskIds(Record):
    """The ids of up to 256 tasks, in five parallel lists."""
    vpid: tuple[U32, ...]
    vtgid: tuple[U32, ...]
    vppid: tuple[U32, ...]
    vpgid: tuple[U32, ...]
    vsid: tuple[U32, ...]


@record(0x0003)
class TaskRecord(Record):
    """One task."""
    vpid: U32
    parent: U32         # vpid of the thread that created it (its parent's thread), 0 for a root
    comm: str
    state: U8           # letter of /proc/PID/stat as a number
    exit_code: U32      # wait(2) status of a zombie; in job-control stop, the signal until the parent has waited for it
    exit_signal: U32
    stop_signal: U32    # in job-control stop, its signal; else 0
    pf_flags: U64       # PF_* of /proc/PID/stat
    mm_id: U32
    files_id: U32
    fs_id: U32
    sighand_id: U32
    cgroup: str


@layout
class Namespace(Struct):
    """A namespace."""
    name: str    # of the link in /proc/PID/ns
    inode: U64
    own: U8      # 1 if it is that of the machine's first process, 2 if only that of the dumping process, else 0


@layout
class NamespaceHolder(Struct):
    """A process outside of the tree."""
    pid: U32            # as the dumping process sees it
    start_time: U64     # as in /proc/PID/stat


@record(0x0004, version=2, optional=True)
class Namespaces(Record):
    """Namespaces of the first root, which all other tasks share. A restart makes those that are not `own`."""
    namespaces: tuple[Namespace, ...]
    ids: tuple[U64, ...] = ()                       # of each of them (NS_GET_ID), which no other has until the next
                                                    # boot; empty before version 2, and where the kernel has none
    holders: tuple[NamespaceHolder, ...] = ()       # without ids: some processes that are in all of them

    @property
    def own_pidns(self) -> bool:
        """Whether the tree lived in a pid namespace of its own."""
        return any(one.name == 'pid' and not one.own for one in self.namespaces)


@record(0x0005, optional=True)
class SystemVObject(Record):
    """A set of System V semaphores, or a message queue. It belongs to no task."""
    number: U32     # counts from 1
    type: str       # of ckptd.sysv
    id: U32
    data: bytes     # of its type, see ckptd.objects.ipc


# ---------------------------------------------------------------- tasks.img

@record(0x0101)
class Credentials(Record):
    """The credentials of a task."""
    vpid: U32
    uids: tuple[U32, ...]            # real, effective, saved, file system
    gids: tuple[U32, ...]            # real, effective, saved, file system
    groups: tuple[U32, ...]
    capabilities: tuple[U64, ...]    # inheritable, permitted, effective, bounding, ambient
    securebits: U32
    no_new_privs: U8
    keepcaps: U8


@record(0x0102)
class Scheduling(Record):
    """Scheduling attributes (sched_getattr(2) and others)."""
    vpid: U32
    policy: U32
    flags: U64
    nice: U8    # 0..39 (nice value + 20)
    priority: U32
    runtime: U64
    deadline: U64
    period: U64
    affinity: bytes      # CPU bit mask, little-endian bytes
    ioprio: U32          # ioprio_get(2)
    timer_slack: U64     # nanoseconds
    util_min: U32 = 0    # utilisation clamp, of 1024
    util_max: U32 = 0    # likewise


@record(0x0103)
class Registers(Record):
    """The registers of a thread."""
    vpid: U32
    machine: U16     # EM_* of <elf.h>
    gpr: bytes       # struct user_regs_struct
    xstate: bytes    # NT_X86_XSTATE regset (XSAVE, standard format)


@record(0x0104)
class ThreadSignals(Record):
    """The signal state of a thread."""
    vpid: U32
    mask: U64    # blocked signals, bit n-1 = signal n
    altstack_sp: U64
    altstack_flags: U32
    altstack_size: U64
    pending: tuple[bytes, ...]    # siginfo_t of 128 bytes each, in queue order


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


# SleepLeft.left_ns: the call has no end, or its arguments contain the end as a point in time
ENDLESS = 2**64 - 1


@record(0x0106)
class SleepLeft(Record):
    """A system call that was interrupted during a wait. Its end was in the restart block, which dies with the task (rax
    of Registers is -516, ERESTART_RESTARTBLOCK), or nowhere in the kernel.

    A restart treats rax -516 as follows before it releases the task. ENDLESS: issue call `number` with its arguments
    unchanged (rax = number, rip - 2). Otherwise let the task issue `number` by a remote call with the same arguments
    but a timeout of left_ns, in memory of its own where the timeout is a pointer (nanosleep rdi, clock_nanosleep rdx,
    futex r10; poll: milliseconds in edx, rounded up). Interrupt it there (PTRACE_INTERRUPT) and set Registers with rax
    = -516. The new restart block then has the right end, and the program's address for the remaining time. If the call
    ends before it is interrupted, the task gets its result in rax. For other values of rax (a call that Registers
    issues again, see ckptd.dump.resume) the timeout in the arguments is the whole one, except where it is a register
    (epoll_wait, epoll_pwait: r10), which already has the rest. exact is then accurate to some milliseconds.
    """
    vpid: U32
    number: U32     # system call that the program made (orig_rax may be 219, restart_syscall); the argument registers
                    # are those of this call
    left_ns: U64    # nanoseconds from the clocks of Header to its end; 0 if that was past; or ENDLESS
    clock: U32      # CLOCK_* on which the end was counted
    exact: U8       # 0 if the end is only bounded: left_ns is then at most too long, and never longer than the whole
                    # timeout


@record(0x0108)
class TaskAttribute(Record):
    """An attribute that no other record has, if it differs from that of a new task."""
    owner: U32      # vpid, mm_id, sighand_id or fs_id, by scope
    scope: U8       # Scope of ckptd.objects.attributes.base
    name: str       # of the class in ckptd.objects.attributes that wrote `data` and reads it back
    data: bytes


@record(0x0110)
class ProcessState(Record):
    """The state of a process."""
    vpid: U32
    personality: U32
    oom_score_adj: U16                   # 0..2000 (value + 1000)
    shared_pending: tuple[bytes, ...]    # siginfo_t of 128 bytes each
    tty: U32                             # device number of the controlling terminal, 0 for none
    tpgid: U32                           # foreground group of the terminal, as a vpid


@layout
class Limit(Struct):
    """A resource limit. RLIM_INFINITY is 2**64 - 1."""
    soft: U64
    hard: U64


@record(0x0111)
class Limits(Record):
    """Resource limits by number, RLIMIT_CPU (0) to RLIMIT_RTTIME (15)."""
    vpid: U32
    limits: tuple[Limit, ...]


@layout
class IntervalTimer(Struct):
    """An interval timer in microseconds."""
    interval: U64
    value: U64


@record(0x0112)
class IntervalTimers(Record):
    """ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF."""
    vpid: U32
    timers: tuple[IntervalTimer, ...]


@layout
class PosixTimer(Struct):
    """A POSIX timer."""
    id: U32
    clock: U32     # clockid_t as u32
    notify: U32    # SIGEV_* (| 4 with a thread)
    signal: U32
    value: U64
    vtid: U32    # of SIGEV_THREAD_ID, else 0
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
    """An open file description."""
    file_id: U32
    kind: str     # tag of the class in ckptd.objects.files that wrote `data` and reads it back
    flags: U32    # O_* as in fdinfo, without O_CLOEXEC
    position: U64
    mode: U32
    owner_type: U32        # of F_GETOWN_EX: F_OWNER_*
    owner: U32             # of F_GETOWN_EX: a vpid
    owner_signal: U32      # F_GETSIG
    link: str              # the link of /proc/PID/fd, for people
    data: bytes
    owner_uid: U32 = 0     # the rights of this uid decide whether the owner's signal may be sent
    owner_euid: U32 = 0    # likewise
    write_hint: U32 = 0    # F_GET_RW_HINT


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
    """An address space."""
    mm_id: U32
    layout: tuple[U64, ...]    # start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start,
                               # arg_end, env_start, env_end (struct prctl_mm_map)
    auxv: bytes                # as in /proc/PID/auxv
    exe: U32                   # backing_id of the executable
    dumpable: U8
    lock_future: U8 = 0        # mlockall(2): 1 MCL_FUTURE, 2 with MCL_ONFAULT
    pkeys: U16 = 0             # allocated protection keys (pkey_alloc(2)), bit n is key n


# Vma.kind. The image has the pages of a VDSO like those of ANON, since another kernel's would not fit its callers.
ANON, STACK, FILE_PRIVATE, FILE_SHARED, SHARED_MEMORY, VDSO, VVAR, VSYSCALL, HEAP, HUGE, IO_URING, \
    AIO = range(1, 13)


@record(0x0302)
class Vma(Record):
    """A mapping."""
    mm_id: U32
    start: U64
    end: U64
    protection: U32    # PROT_*
    flags: U32         # MAP_* to map it again
    kind: U8
    offset: U64        # bytes into the object; of HUGE the size of a huge page
    object: U32        # backing_id, shm_id or inode of an io_uring, by kind
    locked: U8         # 0 no, 1 mlock, 2 on fault
    vm_flags: str      # two-letter codes of smaps, separated by blanks
    name: str          # of PR_SET_VMA_ANON_NAME, or as in maps
    pkey: U8 = 0       # protection key (pkeys(7))


@layout
class PageRun(Struct):
    """`pages` pages from address `start` (in a shared object: byte offset), at byte `offset` of data-<part>.img."""
    start: U64
    pages: U32
    part: U16
    offset: U64


# PageRuns.owner_kind
OF_MM, OF_SHARED_MEMORY = 1, 2


@record(0x0303)
class PageRuns(Record):
    """Page runs, ascending by start. All other pages were absent or zero or, in a private file mapping, are as in the
    file."""
    owner_kind: U8
    owner: U32
    runs: tuple[PageRun, ...]


@layout
class Range(Struct):
    start: U64
    end: U64


@record(0x0304)
class GuardRegions(Record):
    """Ranges of madvise(MADV_GUARD_INSTALL)."""
    mm_id: U32
    ranges: tuple[Range, ...]


# SharedMemory.kind
SHMEM, MEMFD, SYSV = 1, 2, 3


@record(0x0305)
class SharedMemory(Record):
    """A shared object whose content is in the image once."""
    shm_id: U32
    kind: U8
    size: U64
    name: str     # of a memfd
    seals: U32    # of a memfd
    mode: U32
    uid: U32
    gid: U32
    key: U32      # of a System V segment
    shmid: U32    # of a System V segment
    huge: U64 = 0     # size in bytes of a huge page, of memory that has such pages


@record(0x0306)
class Backing(Record):
    """A mapped file or an executable, by path."""
    backing_id: U32
    path: str
    device: U64                    # st_dev of the file itself
    inode: U64                     # st_ino of the file itself
    size: U64
    mtime: U64                     # nanoseconds
    mode: U32
    deleted: U8                    # the path is gone or belongs to another file
    content: tuple[Extent, ...]    # of a deleted file, and of a small one that is written through the mapping: its
                                   # bytes from 0 on; all but the last extent are whole pages
    link: str = ''                 # of a deleted file with another name: that name, or one that the checkpoint gave it
