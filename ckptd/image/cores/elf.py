# SPDX-License-Identifier: LGPL-2.1-or-later
"""ELF64 core files, byte by byte: headers and notes as Linux writes them. Pure.

Layouts are from <elf.h>, <linux/elfcore.h> and arch/x86/include/asm/elf.h; fs/binfmt_elf.c has the order of the notes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ET_CORE = 4
EM_X86_64 = 62
PT_LOAD, PT_NOTE = 1, 4
PF_X, PF_W, PF_R = 1, 2, 4
PN_XNUM = 0xFFFF        # e_phnum for this number or more: section header 0 then has the number in sh_info

NT_PRSTATUS, NT_FPREGSET, NT_PRPSINFO, NT_AUXV = 1, 2, 3, 6
NT_FILE = 0x46494C45
NT_SIGINFO = 0x53494749
NT_X86_XSTATE = 0x202   # note name LINUX; the others are CORE

GPR_SIZE = 27 * 8       # struct user_regs_struct
FPREGS_SIZE = 512       # struct user_i387_struct: the legacy area at the start of every XSAVE image
SIGINFO_SIZE = 128

EHDR = struct.Struct('<16sHHIQQQIHHHHHH')
PHDR = struct.Struct('<IIQQQQQQ')
SHDR = struct.Struct('<IIQQQQIIQQ')
_NOTE = struct.Struct('<III')
_PRSTATUS = struct.Struct('<iiihxxQQiiii64x216sixxxx')
_PRPSINFO = struct.Struct('<bcbbxxxxQIIiiii16s80s')
_FILE_HEAD = struct.Struct('<QQ')
_FILE_ENTRY = struct.Struct('<QQQ')


class Phdr(NamedTuple):
    """Elf64_Phdr."""
    type: int
    flags: int
    offset: int
    vaddr: int
    filesz: int
    memsz: int
    align: int

    def encode(self) -> bytes:
        return PHDR.pack(self.type, self.flags, self.offset, self.vaddr, 0, self.filesz, self.memsz, self.align)


@dataclass(frozen=True, slots=True)
class Prstatus:
    """struct elf_prstatus without the times."""
    signal: int    # the signal that stopped the thread, 0 for none
    pending: int
    blocked: int
    pid: int
    ppid: int
    pgrp: int
    sid: int
    gpr: bytes

    def encode(self) -> bytes:
        return _PRSTATUS.pack(self.signal, 0, 0, self.signal, self.pending, self.blocked, self.pid, self.ppid,
                              self.pgrp, self.sid, self.gpr, 1)


@dataclass(frozen=True, slots=True)
class Prpsinfo:
    """struct elf_prpsinfo."""
    state: str    # the letter
    nice: int     # -20..19
    flags: int
    uid: int
    gid: int
    pid: int
    ppid: int
    pgrp: int
    sid: int
    fname: bytes
    psargs: bytes

    def encode(self) -> bytes:
        number = max(0, 'RSDTZW'.find(self.state))      # pr_state: the kernel's index into these letters
        return _PRPSINFO.pack(number, self.state.encode('ascii'), self.state == 'Z', self.nice, self.flags, self.uid,
                              self.gid, self.pid, self.ppid, self.pgrp, self.sid, self.fname[:15], self.psargs[:79])


class MappedFile(NamedTuple):
    """One entry of NT_FILE."""
    start: int
    end: int
    offset: int    # bytes
    path: bytes


def note(type_: int, desc: bytes, name: bytes = b'CORE') -> bytes:
    """Encode one note, with both parts padded to four bytes."""
    name += b'\0'
    return b''.join((_NOTE.pack(len(name), len(desc), type_), name, bytes(-len(name) % 4), desc, bytes(-len(desc) % 4)))


def file_note(files: Sequence[MappedFile], page_size: int) -> bytes:
    """Encode NT_FILE: the mapped files and their addresses."""
    table = [_FILE_ENTRY.pack(one.start, one.end, one.offset // page_size) for one in files]
    names = [one.path + b'\0' for one in files]
    return note(NT_FILE, b''.join((_FILE_HEAD.pack(len(files), page_size), *table, *names)))


def headers_size(count: int) -> int:
    """Return the bytes of ELF header, `count` program headers and, if needed, the one section header."""
    return EHDR.size + count * PHDR.size + (SHDR.size if count >= PN_XNUM else 0)


def encode_headers(machine: int, phdrs: Sequence[Phdr]) -> bytes:
    """Encode everything before the notes, `headers_size` bytes."""
    extended = len(phdrs) >= PN_XNUM
    shoff = EHDR.size + len(phdrs) * PHDR.size if extended else 0
    ident = b'\x7fELF\x02\x01\x01' + bytes(9)       # 64 bit, little-endian, current version, System V
    ehdr = EHDR.pack(ident, ET_CORE, machine, 1, 0, EHDR.size, shoff, 0, EHDR.size, PHDR.size,
                     PN_XNUM if extended else len(phdrs), SHDR.size if extended else 0, int(extended), 0)
    # section header 0, "Extended numbering": sh_size would be e_shnum, sh_info is e_phnum
    shdr = SHDR.pack(0, 0, 0, 0, 0, 1, 0, len(phdrs), 0, 0) if extended else b''
    return b''.join((ehdr, *(phdr.encode() for phdr in phdrs), shdr))
