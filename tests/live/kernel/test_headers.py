# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every struct, constant and system call number of ckptd/kernel against the headers of this system, by compiling C.

Nothing has to be listed here for a public constant that is a macro of INCLUDES under its own name. Otherwise:
ENUMERATORS (a name that the preprocessor does not know), EXPRESSIONS (another name, or an expression), STRUCTS (each
@cstruct), OWN (numbers that no header has, with the reason). What these headers are too old for is skipped by name.
"""

import ast
import ctypes
import importlib
import inspect
import pkgutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

import pytest

import ckptd.kernel
import ckptd.kernel.arch
from ckptd.kernel.arch.x86_64 import NR

pytestmark = pytest.mark.needs('gcc')

INCLUDES = (
    'stddef.h', 'stdio.h', 'elf.h', 'asm/termbits.h', 'asm/ioctls.h',
    'sys/user.h', 'asm/statfs.h', 'linux/fcntl.h', 'asm/socket.h', 'linux/memfd.h',
    'asm/ptrace.h', 'asm/shmbuf.h', 'asm/unistd.h', 'linux/eventpoll.h', 'linux/falloc.h',
    'linux/aio_abi.h', 'linux/timerfd.h', 'asm/prctl.h', 'linux/io_uring.h',
    'linux/capability.h', 'linux/cn_proc.h', 'linux/connector.h', 'linux/fs.h', 'linux/inotify.h', 'linux/ioprio.h',
    'linux/ipc.h', 'linux/kcmp.h', 'linux/keyctl.h', 'linux/magic.h', 'linux/mempolicy.h', 'linux/mman.h', 'asm/mman.h',
    'linux/netlink.h', 'linux/nsfs.h', 'linux/openat2.h',
    'linux/fanotify.h', 'linux/mqueue.h', 'linux/msg.h', 'asm/msgbuf.h', 'asm/sembuf.h', 'linux/pidfd.h', 'linux/sem.h',
    'linux/prctl.h', 'linux/ptrace.h', 'linux/resource.h', 'linux/bpf_common.h', 'linux/seccomp.h', 'linux/sched.h',
    'linux/sched/types.h', 'linux/shm.h',
    'linux/signal.h', 'linux/signalfd.h', 'linux/sock_diag.h', 'linux/stat.h', 'linux/uio.h',
    'linux/filter.h', 'linux/unix_diag.h', 'linux/wait.h', 'linux/in.h', 'linux/in6.h', 'linux/tcp.h', 'linux/udp.h',
    'linux/inet_diag.h', 'linux/if_packet.h', 'linux/packet_diag.h',
    'linux/netfilter.h', 'linux/netfilter/nfnetlink.h', 'linux/netfilter/nf_tables.h',
)

ENUMERATORS = {
    'nftables': ['NFPROTO_INET', 'NFPROTO_IPV4', 'NFPROTO_IPV6', 'NFT_MSG_NEWTABLE', 'NFT_MSG_GETTABLE',
                 'NFT_MSG_DELTABLE', 'NFT_MSG_NEWCHAIN', 'NFT_MSG_NEWRULE', 'NFT_MSG_NEWSET', 'NFT_MSG_NEWSETELEM'],
    'tcp': ['TCP_NO_QUEUE', 'TCP_RECV_QUEUE', 'TCP_SEND_QUEUE'],
    'inet_diag': ['INET_DIAG_INFO', 'INET_DIAG_SHUTDOWN', 'INET_DIAG_MD5SIG'],
    'families': ['IPPROTO_DCCP', 'IPPROTO_L2TP', 'IPPROTO_SCTP'],
    'packet': ['PACKET_DIAG_INFO', 'PACKET_DIAG_MCLIST', 'PACKET_DIAG_RX_RING', 'PACKET_DIAG_TX_RING',
               'PACKET_DIAG_FANOUT'],
    'kcmp': ['KCMP_FILE', 'KCMP_VM', 'KCMP_FILES', 'KCMP_FS', 'KCMP_SIGHAND', 'KCMP_IO', 'KCMP_SYSVSEM',
             'KCMP_EPOLL_TFD'],
    'io_uring': ['IORING_REGISTER_EVENTFD', 'IORING_REGISTER_PROBE'],
    'mempolicy': ['MPOL_DEFAULT', 'MPOL_F_ADDR', 'MPOL_MF_MOVE'],
    'sched': ['IOPRIO_WHO_PROCESS'],
}

EXPRESSIONS = {
    'aio': {'EVENT_SIZE': 'sizeof(struct io_event)', 'IOCB_SIZE': 'sizeof(struct iocb)'},
    'creds': {'LINUX_CAPABILITY_VERSION_3': '_LINUX_CAPABILITY_VERSION_3'},
    'netlink': {'PROC_CN_MCAST_LISTEN': 'PROC_CN_MCAST_LISTEN', 'PROC_CN_MCAST_IGNORE': 'PROC_CN_MCAST_IGNORE',
                '_EVENT_AT': 'NLMSG_HDRLEN + sizeof(struct cn_msg)',
                '_EVENT_DATA_AT': 'NLMSG_HDRLEN + sizeof(struct cn_msg) + offsetof(struct proc_event, event_data)',
                '_EVENT_NONE': 'PROC_EVENT_NONE', '_EVENT_FORK': 'PROC_EVENT_FORK', '_EVENT_EXIT': 'PROC_EVENT_EXIT'},
    'io_uring': {'SQE_SIZE': 'sizeof(struct io_uring_sqe)', 'CQE_SIZE': 'sizeof(struct io_uring_cqe)'},
    'mqueue': {'SIGEVENT_SIZE': 'sizeof(struct sigevent)'},
    'memory': {'IOV_MAX': 'UIO_MAXIOV'},
    'tcp_segment': {'FIN': '__builtin_bswap32(TCP_FLAG_FIN) >> 16', 'ACK': '__builtin_bswap32(TCP_FLAG_ACK) >> 16'},
    'tty': {'TERMIOS_SIZE': 'sizeof(struct termios2)', 'LOCKED_SIZE': 'sizeof(struct termios)'},
    'signalfd': {'SIGINFO_SIZE': 'sizeof(struct signalfd_siginfo)'},
    'ptrace': {'WALL': '__WALL', 'SYSCALL_STOP': 'SIGTRAP | 0x80', 'SIGINFO_SIZE': 'sizeof(siginfo_t)'},
    'task': {'RLIM_INFINITY': 'RLIM64_INFINITY'},
    'arch.x86_64': {'GPR_SIZE': 'sizeof(struct user_regs_struct)', 'NT_XSTATE': 'NT_X86_XSTATE', 'EM': 'EM_X86_64',
                    'ARCH_MAP_VDSO_64': 'ARCH_MAP_VDSO_64'},
}

# what the kernel shows to nobody but the kernel, or what is ours; by module, with the place that has it
OWN = {
    'yama': {'ANYBODY', 'DECLARED', 'CAPABLE', 'NOBODY'},                   # admin-guide/LSM/Yama.rst
    'aio': {'RING_NAME', 'HEADER_SIZE'},                                    # fs/aio.c
    'closing': {'MOST', 'CROWD', 'ROOM'},
    'epoll': {'POLL_BITS', 'PRIVATE_BITS'},
    'fanotify': {'MARK_FLAGS', 'PERMISSION_EVENTS', 'FAN_PRE_ACCESS'},      # the last one since Linux 6.14
    'inotify': {'KEPT_BITS'},
    # net/tcp_states.h, linux/socket.h, linux/icmp.h, linux/icmpv6.h
    'netlink_options': {'SOL_NETLINK'},
    'inet': {'TCP_ESTABLISHED', 'TCP_SYN_SENT', 'TCP_SYN_RECV', 'TCP_FIN_WAIT1', 'TCP_FIN_WAIT2', 'TCP_TIME_WAIT',
             'TCP_CLOSE', 'TCP_CLOSE_WAIT', 'TCP_LAST_ACK', 'TCP_LISTEN', 'TCP_CLOSING', 'SOL_RAW', 'ICMP_FILTER',
             'ICMPV6_FILTER'},
    # include/linux/socket.h; sys/socket.h of the C library clashes with others
    'families': {'AF_APPLETALK', 'AF_X25', 'AF_KEY', 'AF_ATMPVC', 'AF_ATMSVC', 'AF_RDS', 'AF_PPPOX', 'AF_LLC', 'AF_CAN',
                 'AF_TIPC', 'AF_BLUETOOTH', 'AF_IUCV', 'AF_RXRPC', 'AF_ISDN', 'AF_PHONET', 'AF_IEEE802154', 'AF_CAIF',
                 'AF_ALG', 'AF_NFC', 'AF_VSOCK', 'AF_KCM', 'AF_QIPCRTR', 'AF_SMC', 'AF_XDP', 'AF_MCTP'},
    'packet': {'SOL_PACKET', 'SOCK_PACKET', 'MAX_ADDR_LEN'},     # include/linux/socket.h, net.h, netdevice.h
    # linux/io_uring_types.h; io_uring/io_uring.h; members of an enum since 6.8 and 6.9
    'io_uring': {'IO_RINGFD_REG_MAX', 'IORING_MAX_ENTRIES', 'BUFFER_GROUPS', 'IORING_REGISTER_PBUF_STATUS',
                 'IORING_REGISTER_NAPI'},
    'hidepid': {'NOT_PTRACEABLE'},                                          # include/linux/proc_fs.h
    'creds': {'SUID_DUMP_DISABLE', 'SUID_DUMP_USER', 'SUID_DUMP_ROOT'},     # include/linux/sched/coredump.h
    'kcmp': {'EQUAL', 'LESS', 'GREATER', 'UNEQUAL'},                        # kcmp(2)
    # include/linux/sched.h
    'stat': {'PF_EXITING', 'PF_IO_WORKER', 'PF_FORKNOEXEC', 'PF_SUPERPRIV', 'PF_SIGNALED', 'PF_USER_WORKER',
             'PF_KTHREAD'},
    'ptrace': {'XSTATE_MAX'},
    'memory': {'PAGE'},
    'mempolicy': {'MASK_BITS', 'MASK_SIZE'},
    'pipe': {'SPLICE_F_NONBLOCK'},                                         # splice(2): C libraries only
    'sched': {'SCHED_CAPACITY'},                                            # include/linux/sched.h
    # net/tcp_states.h, net/sock.h; linux/un.h clashes with the C library's header
    'unix': {'SS_ESTABLISHED', 'SS_UNCONNECTED', 'SS_LISTEN', 'RCV_SHUTDOWN', 'SEND_SHUTDOWN', 'SIOCUNIXFILE'},
    'unix_queue': {'SCM_PIDFD', 'SCM_MAX_FD'},                              # include/linux/socket.h, net/scm.h
    'signalfd': {'SIGSET_SIZE'},                                            # include/linux/signal.h
    'status': {'NO_TAGS'},
    'statfs': {'MQUEUE_MAGIC'},                                             # ipc/mqueue.c
    'feature_tests': {'LARGE_TREE'},
    'shm': {'SHM_DEST', 'SHM_LOCKED'},                                      # include/linux/shm.h
    'arch.x86_64': {'ERESTARTSYS', 'ERESTARTNOINTR', 'ERESTARTNOHAND', 'ERESTART_RESTARTBLOCK',   # linux/errno.h
                    'CS_64', 'ROW', 'TASK_SIZE',
                    'XTILEDATA'},                                           # asm/fpu/types.h
}

# macros that came after Linux 6.1, which Debian 12 has headers of
NEWER = {
    'PIDFD_THREAD', 'PAGEMAP_SCAN', 'PAGE_IS_FILE', 'PAGE_IS_PRESENT', 'PAGE_IS_SWAPPED', 'PAGE_IS_PFNZERO',
    'MADV_GUARD_INSTALL', 'MAP_DROPPABLE', 'MFD_EXEC', 'MFD_NOEXEC_SEAL', 'F_SEAL_EXEC',
    'PR_SET_MEMORY_MERGE', 'PR_GET_MEMORY_MERGE', 'PR_SET_MDWE', 'PR_GET_MDWE',
    'PR_TIMER_CREATE_RESTORE_IDS', 'PR_FUTEX_HASH', 'PR_FUTEX_HASH_SET_SLOTS', 'PR_FUTEX_HASH_GET_SLOTS',
    'PAGE_IS_GUARD', 'PID_FS_MAGIC', 'SO_PASSPIDFD', 'SO_PASSRIGHTS', 'SO_INQ',
    'NS_GET_ID', 'PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG', 'EPIOCSPARAMS', 'EPIOCGPARAMS', 'SO_RCVPRIORITY',
    'IP_LOCAL_PORT_RANGE', 'TCP_RTO_MAX_MS', 'TCP_AO_INFO', 'IPPROTO_SMC', 'PACKET_VNET_HDR_SZ',
    'IORING_SETUP_NO_SQARRAY',
}
NEWER_CALLS = {'mseal'}        # likewise, since 6.10


@dataclass(frozen=True)
class CStruct:
    """name: in C. guard: a macro of the same age, where the headers may be too old. fields: those with another name
    in C, or with '' for what stands for several."""
    name: str
    guard: str = ''
    fields: dict[str, str] = field(default_factory=dict)


STRUCTS = {
    'arch.x86_64.user_regs_struct': CStruct('struct user_regs_struct'),
    'clone.clone_args': CStruct('struct clone_args'),
    'io_uring.io_sqring_offsets': CStruct('struct io_sqring_offsets', fields={'user_addr': ''}),     # since 6.5
    'io_uring.io_cqring_offsets': CStruct('struct io_cqring_offsets', fields={'user_addr': ''}),
    'io_uring.io_uring_params': CStruct('struct io_uring_params', fields={f'resv{number}': f'resv[{number}]'
                                                                          for number in range(3)}),
    'io_uring.io_uring_buf_status': CStruct('struct io_uring_buf_status', 'IORING_SETUP_NO_SQARRAY'),
    'creds.cap_user_data': CStruct('struct __user_cap_data_struct'),
    'creds.cap_user_header': CStruct('struct __user_cap_header_struct'),
    'mqueue.mq_attr': CStruct('struct mq_attr', fields={f'reserved{number}': f'__reserved[{number}]'
                                                         for number in range(4)}),
    'namei.open_how': CStruct('struct open_how'),
    'memory.prctl_mm_map': CStruct('struct prctl_mm_map'),
    'memory.page_region': CStruct('struct page_region', 'PAGEMAP_SCAN'),
    'memory.pm_scan_arg': CStruct('struct pm_scan_arg', 'PAGEMAP_SCAN'),
    'prlimit.rlimit64': CStruct('struct rlimit64'),
    'ptrace.iovec': CStruct('struct iovec'),
    'ptrace.ptrace_peeksiginfo_args': CStruct('struct ptrace_peeksiginfo_args'),
    'ptrace.ptrace_rseq_configuration': CStruct('struct ptrace_rseq_configuration', 'PTRACE_GET_RSEQ_CONFIGURATION'),
    'ptrace.ptrace_sud_config': CStruct('struct ptrace_sud_config', 'PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG'),
    'sched.sched_attr': CStruct('struct sched_attr'),
    'seccomp.seccomp_metadata': CStruct('struct seccomp_metadata'),
    'ipc.ipc_perm': CStruct('struct ipc64_perm', fields={'unused1': '__unused1', 'unused2': '__unused2',
                                                         'pad2': '__pad2'}),
    'msg.msqid_ds': CStruct('struct msqid64_ds', fields={'unused4': '__unused4', 'unused5': '__unused5'}),
    'sem.semid_ds': CStruct('struct semid64_ds', fields={f'unused{number}': f'__unused{number}'
                                                         for number in range(1, 5)}),
    'shm.shmid_ds': CStruct('struct shmid64_ds', fields={'unused4': '__unused4', 'unused5': '__unused5'}),
    'statfs.statfs_buf': CStruct('struct statfs', fields={'rest': ''}),
    'statx.statx_buf': CStruct('struct statx', fields={'between': '', 'rest': ''}),
}


def modules() -> dict[str, ModuleType]:
    """Every module of the kernel layer by its name below ckptd.kernel."""
    found = {}
    for package in (ckptd.kernel, ckptd.kernel.arch):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):
            found[info.name.removeprefix('ckptd.kernel.')] = importlib.import_module(info.name)
    return found


MODULES = modules()


def constants(name: str) -> dict[str, int]:
    """Public integers in capitals that the module itself assigns (not those it imports)."""
    tree = ast.parse(inspect.getsource(MODULES[name]))
    targets = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    names = {leaf.id for node in targets for leaf in ast.walk(node)
             if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)}
    values = {key: getattr(MODULES[name], key) for key in names if key.isupper() and not key.startswith('_')}
    return {key: value for key, value in values.items() if isinstance(value, int)}


def structs() -> dict[str, type[ctypes.Structure]]:
    return {f'{name}.{key}': value for name, module in MODULES.items() for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, ctypes.Structure) and value.__module__ == module.__name__}


def struct_lines(key: str, cls: type[ctypes.Structure], c: CStruct) -> Iterator[str]:
    if c.guard:
        yield f'#ifdef {c.guard}'
    yield f'printf("{key} %zu\\n", sizeof({c.name}));'
    for name, *_ in cls._fields_:
        member = c.fields.get(name, name)
        if not member:
            continue
        yield f'printf("{key}.{name} %zu\\n", offsetof({c.name}, {member}));'
        yield f'printf("{key}.{name}.size %zu\\n", sizeof((({c.name} *)0)->{member}));'
    if c.guard:
        yield '#endif'


def constant_lines(name: str) -> Iterator[str]:
    expressions = EXPRESSIONS.get(name, {}) | {key: key for key in ENUMERATORS.get(name, ())}
    for key in constants(name):
        if key not in expressions and key not in OWN.get(name, ()):
            yield f'#ifdef {key}\nprintf("{name}.{key} %llu\\n", (unsigned long long)({key}));\n#endif'
    for key, expression in expressions.items():
        yield f'printf("{name}.{key} %llu\\n", (unsigned long long)({expression}));'


@pytest.fixture(scope='module')
def header_numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the headers say, by 'module.NAME', 'module.struct', 'module.struct.field' and 'NR.call'."""
    lines = [line for key, cls in structs().items() if key in STRUCTS for line in struct_lines(key, cls, STRUCTS[key])]
    lines += [line for name in MODULES for line in constant_lines(name)]
    lines += [f'#ifdef __NR_{call}\nprintf("NR.{call} %d\\n", __NR_{call});\n#endif' for call in NR]
    includes = '\n'.join(f'#include <{header}>' for header in INCLUDES)
    directory = tmp_path_factory.mktemp('headers')
    source = directory / 'numbers.c'
    source.write_text(includes + '\nint main(void) {\n' + '\n'.join(lines) + '\nreturn 0; }\n')
    made = subprocess.run(['gcc', '-w', '-o', directory / 'numbers', source], timeout=30, capture_output=True,
                          text=True)
    assert made.returncode == 0, made.stderr
    answer = subprocess.run([directory / 'numbers'], check=True, timeout=5, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in (line.split() for line in answer.splitlines())}


def test_every_struct_is_in_the_table() -> None:
    assert set(structs()) == set(STRUCTS)


@pytest.mark.parametrize('key', sorted(STRUCTS))
def test_struct(key: str, header_numbers: dict[str, int]) -> None:
    cls = structs()[key]
    if key not in header_numbers:
        pytest.skip(f'these headers have no {STRUCTS[key].name}')
    ours = {key: ctypes.sizeof(cls)}
    for name in (name for name, *_ in cls._fields_ if STRUCTS[key].fields.get(name, name)):
        ours |= {f'{key}.{name}': getattr(cls, name).offset, f'{key}.{name}.size': getattr(cls, name).size}
    assert ours == {name: header_numbers[name] for name in ours}


@pytest.mark.parametrize('name', sorted(MODULES))
def test_constants(name: str, header_numbers: dict[str, int]) -> None:
    expected = constants(name) | {key: getattr(MODULES[name], key) for key in EXPRESSIONS.get(name, ())}
    ours = {key: value % 2**64 for key, value in expected.items() if key not in OWN.get(name, ())}
    theirs = {key: header_numbers[f'{name}.{key}'] for key in ours if f'{name}.{key}' in header_numbers}
    assert theirs == {key: ours[key] for key in theirs}
    assert ours.keys() - theirs.keys() <= NEWER, 'no header has these: see the head of this file'


def test_system_call_numbers(header_numbers: dict[str, int]) -> None:
    theirs = {call: header_numbers[f'NR.{call}'] for call in NR if f'NR.{call}' in header_numbers}
    assert theirs.items() <= NR.items()
    assert NR.keys() - theirs.keys() <= NEWER_CALLS
