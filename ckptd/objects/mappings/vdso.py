# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vdso, which belongs to the kernel: mapped again at its old place or, on another kernel, bridged.

Programs keep addresses of functions inside it (libc resolves them once). Another kernel has these functions at other
places, and other data in vvar. So the old text stays at its place as ordinary memory, and each of its functions becomes
a jump to the function of that name in the new vdso, which is mapped elsewhere.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ

from ckptd.errors import Finding, ImageDamaged
from ckptd.image.reader import ImageReader, Memory
from ckptd.image.records import PAGE, VDSO, VSYSCALL, VVAR, Registers, Vma
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.maps import read_maps
from ckptd.kernel.memory import Mem, read_bytes
from ckptd.kernel.mman import MAP_FIXED_NOREPLACE
from ckptd.objects.attributes.base import about
from ckptd.objects.mappings.base import MappedSpace, MappingCheck, PrivateMemoryKind
from ckptd.objects.support import Support
from ckptd.remote.script import Script

_BESIDE = 16 * PAGE         # distance of another kernel's vdso from the arena of the stubs
# <elf.h>
_PT_DYNAMIC, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _STT_FUNC = 2, 4, 5, 6, 2
_PHDR, _DYN, _SYM = struct.Struct('<IIQQQQQQ'), struct.Struct('<qQ'), struct.Struct('<IBBHQQ')


@dataclass(frozen=True)
class Vdso:
    """The text of a vdso, and the number of bytes of vvar before it."""
    text: bytes
    data_length: int

    @cached_property
    def functions(self) -> dict[str, int]:
        """Offset of each function by its name."""
        return parse_functions(self.text)


@cache
def own() -> Vdso:
    """Return the vdso of this kernel."""
    found = {one.path: one for one in reversed(read_maps(os.getpid())) if one.path in ('[vdso]', '[vvar]')}
    if '[vdso]' not in found:
        return Vdso(b'', 0)
    text = found['[vdso]']
    return Vdso(read_bytes(os.getpid(), text.start, text.size), text.start - found['[vvar]'].start)


def parse_functions(text: bytes) -> dict[str, int]:
    """Parse the dynamic symbols of a vdso, which is an ELF file. ImageDamaged if it is not one."""
    try:
        entries = dict(_dynamic(text))
        symbols, strings = entries[_DT_SYMTAB], entries[_DT_STRTAB]
        if _DT_HASH in entries:
            count = struct.unpack_from('<I', text, entries[_DT_HASH] + 4)[0]
        else:
            count = (strings - symbols) // _SYM.size      # linkers put the strings right behind the symbols
        found = {}
        for index in range(count):
            name, info, _, section, value, _ = _SYM.unpack_from(text, symbols + index * _SYM.size)
            if info & 15 == _STT_FUNC and section:
                found[text[strings + name:text.index(b'\0', strings + name)].decode()] = value
        return found
    except (struct.error, KeyError, ValueError) as error:
        raise ImageDamaged(f'the vdso of the image is not an ELF file: {error}', resource='vdso') from error


def _dynamic(text: bytes) -> list[tuple[int, int]]:
    offset, size, count = struct.unpack_from('<Q14xHH', text, 32)
    for index in range(count):
        kind, _, at, _, _, length, _, _ = _PHDR.unpack_from(text, offset + index * size)
        if kind == _PT_DYNAMIC:
            return list(_DYN.iter_unpack(text[at:at + length]))
    raise KeyError('no PT_DYNAMIC')


class KernelsOwnKind(PrivateMemoryKind):
    """A mapping that the kernel makes. By itself it does not come back."""
    is_kernels = True

    def map(self, vma: Vma, protection: int, script: Script, space: MappedSpace) -> None:
        return


class VvarMapping(KernelsOwnKind, numbers=[VVAR], names=['[vvar]', '[vvar_vclock]']):
    """The data of the vdso, before its text. The kernel maps both at once."""
    support = Support('vdso and vvar', warned='the vdso of another kernel: calls are redirected',
                      refused='a task inside of a function of the vdso of another kernel')


class VsyscallMapping(KernelsOwnKind, numbers=[VSYSCALL], names=['[vsyscall]']):
    """The page of old system calls, above the addresses of programs."""
    support = VvarMapping.support


class VdsoMapping(KernelsOwnKind, numbers=[VDSO], names=['[vdso]']):
    """The text of the vdso. The image has it for debuggers, and for a restart on another kernel."""
    support = VvarMapping.support
    keeps_all_pages = True

    def lacks(self, context: MappingCheck) -> Iterator[Finding]:
        """Check the vdso. On another kernel its functions become jumps, so a task inside one would continue in the
        middle of a jump."""
        reader = context.reader
        for mm_id, user in context.mm_users.items():
            memory = reader.memory(mm_id)
            text = _text(memory.vmas)
            if text is None or _old(reader, memory) == own():
                continue
            kernel = reader.manifest.kernel
            yield about(user, 'vdso', 'ENOSYS', f'its vdso is that of kernel {kernel}: calls are redirected to that of '
                        'this kernel', 'each call takes one more jump', 'warning')
            for task in context.alive:
                registers = arch.user_regs_struct.from_buffer_copy(reader.get(Registers, task.vpid).gpr)
                if task.record.mm_id == mm_id and text.start <= registers.rip < text.end:
                    yield about(task.vpid, 'vdso', 'EOPNOTSUPP', 'stands inside a function of the vdso, which another '
                                'kernel does not have', f'boot kernel {kernel} again, or checkpoint at another moment')

    def map(self, vma: Vma, protection: int, script: Script, space: MappedSpace) -> None:
        if vma != _text(space.memory.vmas):
            return
        old = _old(space.means.reader, space.memory)
        if old == own():
            script.call('arch_prctl', arch.ARCH_MAP_VDSO_64, vma.start - old.data_length, about='the vdso')
            return
        script.call('mmap', vma.start, vma.end - vma.start, PROT_READ | PROT_EXEC,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0,
                    about='the old vdso', expect=vma.start)
        if own().text:
            script.call('arch_prctl', arch.ARCH_MAP_VDSO_64, _elsewhere(space), about='the vdso')

    def patch(self, vma: Vma, space: MappedSpace) -> None:
        """Write the old text with its jumps, if it is bridged."""
        if vma != _text(space.memory.vmas) or (old := _old(space.means.reader, space.memory)) == own():
            return
        with Mem(space.stub.tid) as mem:
            mem.write(vma.start, bridge(old, own(), _elsewhere(space) + own().data_length))


def _elsewhere(space: MappedSpace) -> int:
    """Return the address for the new vdso if the old one is bridged."""
    return space.stub.arena.end + _BESIDE


def bridge(old: Vdso, new: Vdso, at: int) -> bytes:
    """Return the old text, with each of its functions a jump into the new one, which is mapped at `at`."""
    text = bytearray(old.text)
    for name, offset in old.functions.items():
        if name in new.functions:
            code = arch.jump(at + new.functions[name])
            text[offset:offset + len(code)] = code
    return bytes(text)


def _text(vmas: Sequence[Vma]) -> Vma | None:
    return next((vma for vma in vmas if vma.kind == VDSO), None)


def _old(reader: ImageReader, memory: Memory) -> Vdso:
    text = _text(memory.vmas)
    assert text is not None
    first = min((vma.start for vma in memory.vmas if vma.kind == VVAR), default=text.start)
    return Vdso(reader.read_memory(memory, text.start, text.end - text.start), text.start - first)
