# SPDX-License-Identifier: LGPL-2.1-or-later
"""The PT_NOTE segment of a process: its ids, its threads with their registers, its files and auxiliary vector."""

import struct
from collections.abc import Iterable, Sequence

from ckptd.errors import ImageDamaged
from ckptd.image.cores.elf import (
    FPREGS_SIZE,
    GPR_SIZE,
    NT_AUXV,
    NT_FPREGSET,
    NT_PRPSINFO,
    NT_PRSTATUS,
    NT_SIGINFO,
    NT_X86_XSTATE,
    SIGINFO_SIZE,
    MappedFile,
    Prpsinfo,
    Prstatus,
    file_note,
    note,
)
from ckptd.image.cores.xstate import for_debuggers
from ckptd.image.reader import ImageReader, ImageTask, Memory
from ckptd.image.records import (
    FILE_PRIVATE,
    FILE_SHARED,
    PAGE,
    Backing,
    Credentials,
    ProcessState,
    Registers,
    Scheduling,
    ThreadSignals,
)

_ARG_START, _ARG_END = 7, 8     # indices into Mm.layout
_PSARGS = 79


def encode_notes(reader: ImageReader, tasks: Sequence[ImageTask], memory: Memory) -> bytes:
    """Encode all notes of a process. `tasks` are its living threads, the leader first if it lives."""
    process = [note(NT_PRPSINFO, _prpsinfo(reader, tasks[0], memory).encode()), note(NT_AUXV, memory.mm.auxv),
               file_note(_mapped_files(reader, memory), PAGE)]
    # A debugger assigns a note to the thread of the last NT_PRSTATUS. Notes of the process follow the first, as in the
    # kernel's own cores.
    first, *others = [_thread_notes(reader, task) for task in tasks]
    return b''.join((first[0], *process, *first[1:], *(one for notes in others for one in notes)))


def _thread_notes(reader: ImageReader, task: ImageTask) -> list[bytes]:
    registers = reader.get(Registers, task.vpid)
    signals = reader.table(ThreadSignals).get(task.vpid)
    if len(registers.gpr) != GPR_SIZE:
        raise ImageDamaged(f'Registers {task.vpid}: {len(registers.gpr)} bytes, not {GPR_SIZE}', resource='tasks.img')
    pending = signals.pending if signals else ()
    shared = _shared_pending(reader, task)
    status = Prstatus(signal=task.record.stop_signal & 0x7F, pending=_mask((*pending, *shared)),
                      blocked=signals.mask if signals else 0, pid=_pid(task.vpid), ppid=_pid(task.vppid),
                      pgrp=_pid(task.vpgid), sid=_pid(task.vsid), gpr=registers.gpr)
    notes = [note(NT_PRSTATUS, status.encode())]
    if info := _siginfo(task, (*pending, *shared)):
        notes.append(note(NT_SIGINFO, info))
    if len(registers.xstate) >= FPREGS_SIZE:
        notes += [note(NT_FPREGSET, registers.xstate[:FPREGS_SIZE]),
                  note(NT_X86_XSTATE, for_debuggers(registers.xstate), b'LINUX')]
    return notes


def _shared_pending(reader: ImageReader, task: ImageTask) -> tuple[bytes, ...]:
    state = reader.table(ProcessState).get(task.vpid) if task.is_leader else None
    return state.shared_pending if state else ()


def _siginfo(task: ImageTask, pending: Sequence[bytes]) -> bytes:
    """Return the siginfo that a debugger should show: that of the stop, else the first pending one, else none."""
    if task.record.stop_signal:
        return struct.pack('<i', task.record.stop_signal & 0x7F).ljust(SIGINFO_SIZE, b'\0')
    return pending[0].ljust(SIGINFO_SIZE, b'\0')[:SIGINFO_SIZE] if pending else b''


def _mask(pending: Iterable[bytes]) -> int:
    numbers = (int.from_bytes(info[:4], 'little') for info in pending)
    mask = 0
    for number in numbers:
        if 1 <= number <= 64:
            mask |= 1 << number - 1
    return mask


def _pid(value: int) -> int:
    # pid_t is signed, fields of an image are not; masking ensures that packing never fails
    return value & 0x7FFFFFFF


def _prpsinfo(reader: ImageReader, task: ImageTask, memory: Memory) -> Prpsinfo:
    credentials = reader.table(Credentials).get(task.vpid)
    scheduling = reader.table(Scheduling).get(task.vpid)
    nice = scheduling.nice - 20 if scheduling and scheduling.nice < 40 else 0
    state = chr(task.record.state)
    return Prpsinfo(state=state if state.isascii() else 'R', nice=nice, flags=task.record.pf_flags,
                    uid=credentials.uids[0] if credentials and credentials.uids else 0,
                    gid=credentials.gids[0] if credentials and credentials.gids else 0,
                    pid=_pid(task.vtgid), ppid=_pid(task.vppid), pgrp=_pid(task.vpgid), sid=_pid(task.vsid),
                    fname=task.record.comm.encode('utf-8', 'surrogateescape'),
                    psargs=_arguments(reader, memory))


def _arguments(reader: ImageReader, memory: Memory) -> bytes:
    """Return the command line from the process's memory, with blanks for zeros."""
    layout = memory.mm.layout
    start, end = (layout[_ARG_START], layout[_ARG_END]) if len(layout) > _ARG_END else (0, 0)
    text = reader.read_memory(memory, start, max(0, min(_PSARGS, end - start)))
    return text.rstrip(b'\0').replace(b'\0', b' ')


def _mapped_files(reader: ImageReader, memory: Memory) -> list[MappedFile]:
    return [MappedFile(vma.start, vma.end, vma.offset, _path(reader.get(Backing, vma.object)))
            for vma in memory.vmas if vma.kind in (FILE_PRIVATE, FILE_SHARED) and vma.object]


def _path(backing: Backing) -> bytes:
    # as in the kernel: without this mark, a debugger would use the file that is at the path now
    deleted = b' (deleted)' if backing.deleted else b''
    return backing.path.encode('utf-8', 'surrogateescape').replace(b'\0', b'?') + deleted
