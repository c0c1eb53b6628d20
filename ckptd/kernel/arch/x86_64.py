# SPDX-License-Identifier: LGPL-2.1-or-later
"""x86-64: registers, system call numbers, and the code with which a stopped task does system calls.

The code blob runs in the tracee, in otherwise unused memory (see ckptd.remote.borrow). It uses no stack and no FPU
register, and its end restores every register by itself:

    entry:  one system call, arguments as immediates         (BOOT), or a walk over a table of calls at rbx (LOOP)
    trap:   tgkill(self, a signal that is ignored by default): a tracer sees a signal-delivery-stop and takes over;
            without a tracer nothing happens and the code goes on
    heal:   munmap(r15, r14), rt_sigprocmask(original mask), flags, 15 registers, jmp to where the task was

So a tracee whose tracer dies in the middle repairs itself. Unlike with rt_sigreturn, it keeps its restart block: an
interrupted nanosleep continues with the remaining time. (Linux kernel/signal.c: rt_sigreturn sets
do_no_restart_syscall; arch/x86/kernel/signal.c: a restart needs rax and rip - 2 only.)
"""

import ctypes
import errno
import struct
from array import array
from collections.abc import Sequence

from ckptd.kernel.decl import c_int, c_void_p, cstruct, syscall, u64

EM = 62                     # EM_X86_64 of <elf.h>
TASK_SIZE = 0x7ffffffff000  # upper limit for mmap(2) without a hint above it, also with five-level page tables
# <asm/prctl.h>: map vvar at the address and the vdso behind it
ARCH_MAP_VDSO_64 = 0x2003
# <asm/prctl.h>: components of XSAVE that a process has to ask for, as a mask; the request takes a number
ARCH_GET_XCOMP_SUPP, ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM = 0x1021, 0x1022, 0x1023
XTILEDATA = 18              # data of AMX tiles; arch/x86/include/asm/fpu/types.h
NT_XSTATE = 0x202           # NT_X86_XSTATE
CS_64 = 0x33                # __USER_CS; any other code segment is a 32-bit task
GPR_SIZE = 216

# <asm/unistd_64.h>: calls that are made by number, here or in a tracee
NR = {
    'write': 1, 'close': 3, 'poll': 7, 'lseek': 8, 'mmap': 9, 'mprotect': 10, 'munmap': 11, 'brk': 12,
    'rt_sigaction': 13, 'rt_sigprocmask': 14, 'ioctl': 16, 'mremap': 25, 'madvise': 28, 'shmat': 30, 'nanosleep': 35,
    'getitimer': 36, 'setitimer': 38, 'getpid': 39, 'connect': 42, 'recvmsg': 47, 'listen': 50, 'socketpair': 53,
    'exit': 60, 'wait4': 61, 'kill': 62, 'shmdt': 67, 'fcntl': 72, 'flock': 73, 'fchdir': 81, 'umask': 95,
    'setuid': 105, 'setpgid': 109, 'setsid': 112, 'setgroups': 116, 'setresuid': 117, 'setresgid': 119,
    'setfsuid': 122, 'setfsgid': 123, 'capset': 126, 'rt_sigtimedwait': 128, 'rt_sigqueueinfo': 129,
    'sigaltstack': 131, 'personality': 135, 'mlock': 149, 'mlockall': 151, 'modify_ldt': 154, 'prctl': 157,
    'arch_prctl': 158, 'chroot': 161, 'futex': 202, 'sched_setaffinity': 203, 'io_setup': 206, 'io_getevents': 208,
    'io_submit': 209, 'set_tid_address': 218, 'restart_syscall': 219, 'semtimedop': 220, 'timer_create': 222,
    'timer_settime': 223, 'timer_gettime': 224, 'timer_getoverrun': 225, 'timer_delete': 226, 'clock_nanosleep': 230,
    'exit_group': 231, 'epoll_wait': 232, 'epoll_ctl': 233, 'tgkill': 234, 'mbind': 237, 'set_mempolicy': 238,
    'get_mempolicy': 239, 'mq_open': 240, 'mq_unlink': 241, 'mq_notify': 244, 'mq_getsetattr': 245, 'waitid': 247,
    'keyctl': 250, 'ioprio_set': 251, 'ioprio_get': 252, 'openat': 257, 'unshare': 272, 'set_robust_list': 273,
    'get_robust_list': 274, 'epoll_pwait': 281, 'eventfd2': 290, 'dup3': 292, 'preadv': 295, 'rt_tgsigqueueinfo': 297,
    'open_by_handle_at': 304, 'kcmp': 312, 'sched_setattr': 314, 'sched_getattr': 315, 'seccomp': 317, 'execveat': 322,
    'membarrier': 324, 'mlock2': 325, 'pkey_mprotect': 329, 'pkey_alloc': 330, 'pkey_free': 331, 'io_pgetevents': 333,
    'rseq': 334, 'io_uring_enter': 426, 'clone3': 435, 'close_range': 436, 'openat2': 437, 'pidfd_getfd': 438,
    'epoll_pwait2': 441, 'mseal': 462,
}


@syscall(NR['arch_prctl'])
def arch_prctl(option: c_int, value: c_void_p) -> c_int: ...


# semop, msgsnd, msgrcv, rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, io_pgetevents, epoll_pwait2
_NEVER_RESTARTED = frozenset((65, 69, 70, 128, 208, 220, 232, 281, 333, 441))

# include/linux/errno.h: rax of a task that was interrupted inside a system call
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516

SIG_SETMASK = 2
_MASK64 = 2**64 - 1


@cstruct(size=GPR_SIZE)
class user_regs_struct(ctypes.Structure):
    """<sys/user.h>; also the NT_PRSTATUS regset and pr_reg of a core."""
    r15: u64
    r14: u64
    r13: u64
    r12: u64
    rbp: u64
    rbx: u64
    r11: u64
    r10: u64
    r9: u64
    r8: u64
    rax: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    orig_rax: u64
    rip: u64
    cs: u64
    eflags: u64
    rsp: u64
    ss: u64
    fs_base: u64
    gs_base: u64
    ds: u64
    es: u64
    fs: u64
    gs: u64


# general registers that `mov r64, imm64` can load, by their number in the encoding; rsp is never changed
_ENCODING = {'rax': 0, 'rcx': 1, 'rdx': 2, 'rbx': 3, 'rbp': 5, 'rsi': 6, 'rdi': 7, 'r8': 8, 'r9': 9, 'r10': 10,
             'r11': 11, 'r12': 12, 'r13': 13, 'r14': 14, 'r15': 15}
_ARGUMENTS = ('rdi', 'rsi', 'rdx', 'r10', 'r8', 'r9')
_SYSCALL = b'\x0f\x05'
_EFLAGS_DF, _EFLAGS_OF = 0x400, 0x800

ROW = 8                     # u64 in a row of the table: number, six arguments, result
LAST_ROW = array('Q', [2**64 - 1, *[0] * 7])
_LOOP = bytes.fromhex(
    '488b03'                # loop: mov rax, [rbx]
    '4883f8ff'              #       cmp rax, -1
    '7424'                  #       je  end
    '488b7b08'              #       mov rdi, [rbx+8]
    '488b7310'              #       mov rsi, [rbx+16]
    '488b5318'              #       mov rdx, [rbx+24]
    '4c8b5320'              #       mov r10, [rbx+32]
    '4c8b4328'              #       mov r8, [rbx+40]
    '4c8b4b30'              #       mov r9, [rbx+48]
    '0f05'                  #       syscall
    '48894338'              #       mov [rbx+56], rax
    '4883c340'              #       add rbx, 64
    'ebd3'                  #       jmp loop
)                           # end:


def _mov(register: str, value: int) -> bytes:
    number = _ENCODING[register]
    return bytes((0x48 | number >> 3, 0xB8 | number & 7)) + struct.pack('<Q', value & _MASK64)


def _call(number: int, arguments: Sequence[int]) -> bytes:
    loads = [_mov(register, value) for register, value in zip(_ARGUMENTS, arguments, strict=False)]
    return b''.join(loads) + _mov('rax', number) + _SYSCALL


_UNMAP = b'\x4c\x89\xff' + b'\x4c\x89\xf6' + _mov('rax', NR['munmap']) + _SYSCALL        # mov rdi, r15; mov rsi, r14


def interrupted(regs: user_regs_struct) -> user_regs_struct:
    """Return the registers with which the task continues in user mode as the kernel would have done it: an interrupted
    system call that is to be restarted is issued again, by rip - 2."""
    after = user_regs_struct.from_buffer_copy(regs)
    if ctypes.c_int64(regs.orig_rax).value >= 0:
        code = -ctypes.c_int64(regs.rax).value
        if code in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
            after.rax, after.rip = regs.orig_rax, regs.rip - 2
        elif code == ERESTART_RESTARTBLOCK:
            after.rax, after.rip = NR['restart_syscall'], regs.rip - 2
    return after


def interrupted_for_good(regs: user_regs_struct) -> bool:
    """Whether the task is about to return EINTR from a system call that no kernel restarts."""
    return ctypes.c_int64(regs.rax).value == -errno.EINTR and regs.orig_rax in _NEVER_RESTARTED


def in_restart_block(regs: user_regs_struct) -> bool:
    """Whether the task will continue a system call whose end is in its restart block in the kernel."""
    return (ctypes.c_int64(regs.rax).value == -ERESTART_RESTARTBLOCK
            and ctypes.c_int64(regs.orig_rax).value >= 0)


def again(regs: user_regs_struct) -> user_regs_struct:
    """Return registers with which the task issues the system call again that it is returning from."""
    after = user_regs_struct.from_buffer_copy(regs)
    after.rax, after.rip, after.orig_rax = regs.orig_rax, regs.rip - 2, _MASK64
    return after


def _flags(eflags: int) -> bytes:
    """Return code that loads the flags without the stack: sahf takes SF ZF AF PF CF from ah. Adding 0x7f to al
    overflows if al is 1, and does not if it is 0."""
    ax = (eflags & 0xFF) << 8 | bool(eflags & _EFLAGS_OF)
    direction = b'\xfd' if eflags & _EFLAGS_DF else b'\xfc'
    return _mov('rax', ax) + b'\x04\x7f' + b'\x9e' + direction


def _tail(regs: user_regs_struct, mask: int, tgid: int, tid: int, signal: int) -> bytes:
    """Return the code for trap and heal. tgid, tid: as in the tracee's own pid namespace."""
    after = interrupted(regs)
    trap = _call(NR['tgkill'], (tgid, tid, signal))             # the code for it ends at trap_offset
    after_lea = _mov('rdx', 0) + _mov('r10', 8) + _mov('rax', NR['rt_sigprocmask']) + _SYSCALL
    registers = _flags(regs.eflags) + b''.join(_mov(name, getattr(after, name)) for name in _ENCODING)
    jump = b'\xff\x25' + struct.pack('<i', 8)                                            # jmp [rip + 8]
    # the original mask lies behind the jump
    distance = len(after_lea) + len(registers) + len(jump)
    lea_rsi = b'\x48\x8d\x35' + struct.pack('<i', distance)                             # lea rsi, [rip + distance]
    set_mask = _mov('rdi', SIG_SETMASK) + lea_rsi + after_lea
    return trap + _UNMAP + set_mask + registers + jump + struct.pack('<QQ', mask, after.rip)


def boot_code(number: int, arguments: Sequence[int], regs: user_regs_struct, mask: int, tgid: int, tid: int,
              signal: int) -> bytes:
    """Return code for one system call. At the trap its result is in r15."""
    return _call(number, arguments) + b'\x49\x89\xc7' + _tail(regs, mask, tgid, tid, signal)    # mov r15, rax


def loop_code(regs: user_regs_struct, mask: int, tgid: int, tid: int, signal: int) -> bytes:
    """Return code for the calls of the table at rbx, up to a row whose number is -1."""
    return _LOOP + _tail(regs, mask, tgid, tid, signal)


def trap_offset(code: bytes) -> int:
    """Return the offset at which a task stands when it has sent itself the trap signal: behind that system call, before
    heal."""
    return code.index(_UNMAP)


def start_registers(regs: user_regs_struct, code: int, table: int, area: int, length: int) -> user_regs_struct:
    """Return registers to run the blob with. orig_rax -1 tells the kernel that there is no system call to restart."""
    start = user_regs_struct.from_buffer_copy(regs)
    start.rip, start.rbx, start.r15, start.r14 = code, table, area, length
    start.orig_rax, start.rax = _MASK64, 0
    return start


# ---------------------------------------------------------------- stubs of a restart

# The calls of the table at rbx, then int3: a tracer takes over. A stub always has one (PTRACE_O_EXITKILL).
STUB = _LOOP + b'\xcc'


def stub_registers(code: int, table: int, stack: int = 0) -> user_regs_struct:
    """Return registers to run STUB with, placed at address `code`. STUB uses no stack, but other code may."""
    return user_regs_struct(rip=code, rbx=table, rsp=stack, orig_rax=_MASK64, cs=CS_64, ss=0x2B, eflags=0x202)


def stub_trapped(code: int) -> int:
    """Return rip of a task that has done all calls of its table."""
    return code + len(STUB)


def stub_program(address: int) -> bytes:
    """Return a static program of one page at `address` that only traps."""
    page = 4096
    ident = b'\x7fELF\x02\x01\x01'        # 64-bit, little-endian; type 2 is ET_EXEC
    header = struct.pack('<16sHHIQQQIHHHHHH', ident, 2, EM, 1, address + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load = struct.pack('<IIQQQQQQ', 1, 5, 0, address, address, page, page, page)
    return (header + load + b'\xcc').ljust(page, b'\xcc')


def exit_code() -> bytes:
    """Return code that ends the process with status 0: xor edi, edi; mov eax, exit_group; syscall."""
    return bytes.fromhex('31ff' 'b8e7000000' '0f05')


def jump(to: int) -> bytes:
    """Return code that continues at an address: mov r11, to; jmp r11. Any call may overwrite r11."""
    return b'\x49\xbb' + struct.pack('<Q', to) + b'\x41\xff\xe3'


# A thread gets room for tiles at its first instruction that uses one (arch/x86/kernel/fpu/xstate.c,
# xfd_enable_feature): ldtilecfg [rbx]; tilezero tmm0; int3
USE_TILES = bytes.fromhex('c4e2784903' 'c4e27b49c0' 'cc')
TILE_CONFIG = struct.pack('<B15xH30xB15x', 1, 4, 1)        # palette 1: one tile, of one row of four bytes


# The first process of a pid namespace reaps dead processes. When none is left, it exits with the status of process
# `pid`.
_REAPER = (
    '4531e4'                # xor r12d, r12d
    '48c7c7ffffffff'        # loop: mov rdi, -1
    '488d742480'            # lea rsi, [rsp - 128]
    'ba00000040'            # mov edx, __WALL
    '4531d2'                # xor r10d, r10d
    'b83d000000' '0f05'     # mov eax, wait4; syscall
    '3d' '{pid}'            # cmp eax, pid
    '7505'                  # jne next
    '448b642480'            # mov r12d, [rsp - 128]
    '4883f8f6'              # next: cmp rax, -ECHILD
    '75d3'                  # jne loop
    '4489e7' '83e77f'       # mov edi, r12d; and edi, 0x7f
    '7408'                  # jz exited
    '81c780000000'          # add edi, 128: as a shell reports a signal
    'eb0c'                  # jmp end
    '4489e7' 'c1ef08'       # exited: mov edi, r12d; shr edi, 8
    '81e7ff000000'          # and edi, 0xff
    'b8e7000000' '0f05'     # end: mov eax, exit_group; syscall
)


def reaper(pid: int) -> bytes:
    """Return the code of a namespace's first process. It needs 128 bytes below rsp."""
    return bytes.fromhex(_REAPER.replace('{pid}', struct.pack('<I', pid).hex()))
