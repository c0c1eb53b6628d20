# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on memory: all of them on one window of addresses, so that mappings meet, split and merge."""

import struct

from hypothesis import strategies as st

from tests.generated.programs import Program, operation

BASE, PAGE, PAGES = 0x10000000000, 4096, 48
FIXED, ANONYMOUS = 0x10, 0x20
SHARED, PRIVATE, DROPPABLE = 1, 2, 8
MAP_GROWSDOWN, MAP_LOCKED = 0x100, 0x2000

page, length = st.integers(0, PAGES - 1), st.integers(1, 8)
number = st.integers(0, 20)
protection = st.sampled_from([3, 1, 0, 7, 5, 2, 4])
# MAP_NORESERVE, MAP_LOCKED, MAP_POPULATE, MAP_GROWSDOWN, MAP_STACK, MAP_NONBLOCK
flags = st.sets(st.sampled_from([0x4000, MAP_LOCKED, 0x8000, MAP_GROWSDOWN, 0x20000, 0x10000]), max_size=2).map(sum)
sharing = st.sampled_from([PRIVATE, SHARED, DROPPABLE])
# MADV_*: all that change more than what is there at the moment, but for those that need a special kernel
advice = st.sampled_from([0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 25, 102, 103])
# MPOL_*, with MPOL_F_STATIC_NODES and MPOL_F_RELATIVE_NODES
policy = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 0x8002, 0x4003])


def at(index: int) -> int:
    return BASE + index * PAGE


@operation(page=page, length=length, protection=protection, flags=flags, sharing=sharing)
def map_anonymous(program: Program, page: int, length: int, protection: int, flags: int, sharing: int) -> None:
    program.call('mmap', at(page), length * PAGE, protection, flags | sharing | FIXED | ANONYMOUS, -1, 0)


@operation(page=page, length=length, protection=protection, flags=flags, sharing=st.sampled_from([PRIVATE, SHARED]),
           file=number, offset=st.integers(0, 3))
def map_file(program: Program, page: int, length: int, protection: int, flags: int, sharing: int, file: int,
             offset: int) -> None:
    program.call('mmap', at(page), length * PAGE, protection, flags | sharing | FIXED, program.file(file),
                 offset * PAGE)


@operation(page=page, length=length, advice=advice)
def advise(program: Program, page: int, length: int, advice: int) -> None:
    program.call('madvise', at(page), length * PAGE, advice)


@operation(page=page, length=length, protection=protection)
def protect(program: Program, page: int, length: int, protection: int) -> None:
    program.call('mprotect', at(page), length * PAGE, protection)


@operation(page=page, length=length, protection=protection, key=st.integers(0, 4), free=st.booleans())
def protect_by_key(program: Program, page: int, length: int, protection: int, key: int, free: bool) -> None:
    program.call('pkey_alloc', 0, 0)
    program.call('pkey_mprotect', at(page), length * PAGE, protection, key)
    if free:
        program.call('pkey_free', key)


@operation(page=page, length=length, name=st.sampled_from(['mlock', 'munlock']))
def lock(program: Program, page: int, length: int, name: str) -> None:
    program.call(name, at(page), length * PAGE)


@operation(page=page, length=length)
def lock_on_fault(program: Program, page: int, length: int) -> None:
    program.call('mlock2', at(page), length * PAGE, 1)


@operation(flags=st.sampled_from([0, 1, 2, 3, 5, 6, 7]))
def lock_all(program: Program, flags: int) -> None:
    if flags:
        program.call('mlockall', flags)
    else:
        program.call('munlockall')


@operation(page=page, length=length, new=st.integers(0, 10), flags=st.sampled_from([0, 1, 3, 5, 7]), to=page)
def remap(program: Program, page: int, length: int, new: int, flags: int, to: int) -> None:
    program.call('mremap', at(page), length * PAGE, new * PAGE, flags, at(to))


@operation(page=page, length=length)
def unmap(program: Program, page: int, length: int) -> None:
    program.call('munmap', at(page), length * PAGE)


@operation(page=page, length=length)
def write_memory(program: Program, page: int, length: int) -> None:
    """A word of each page."""
    for index in range(page, min(page + length, PAGES)):
        program.call('getrandom', at(index), 8, 0)


@operation(page=page, length=length)
def seal(program: Program, page: int, length: int) -> None:
    program.call('mseal', at(page), length * PAGE, 0)


@operation(page=page, length=length, name=st.sampled_from([b'a name', b'', b'x', b'/path']))
def name_memory(program: Program, page: int, length: int, name: bytes) -> None:
    program.call('prctl', 0x53564D41, 0, at(page), length * PAGE, name + b'\0')


@operation(page=page, length=length, policy=policy, nodes=st.sampled_from([0, 1]))
def bind(program: Program, page: int, length: int, policy: int, nodes: int) -> None:
    program.call('mbind', at(page), length * PAGE, policy, struct.pack('<Q', nodes), 64, 0)


@operation(policy=policy, nodes=st.sampled_from([0, 1]))
def set_policy(program: Program, policy: int, nodes: int) -> None:
    program.call('set_mempolicy', policy, struct.pack('<Q', nodes), 64)


@operation(page=page, length=length, flags=st.sampled_from([0, 0o10000, 0o100000]),
           mode=st.sampled_from([0o600, 0o400]))
def attach_segment(program: Program, page: int, length: int, flags: int, mode: int) -> None:
    """A System V segment that is removed with its last user: SHM_RDONLY, SHM_EXEC."""
    segment = program.call('shmget', 0, length * PAGE, 0o1000 | mode)
    program.call('shmat', segment, at(page), flags)
    program.call('shmctl', segment, 0, 0)


@operation(grow=st.integers(-2, 4))
def move_break(program: Program, grow: int) -> None:
    now = program.call('brk', 0)
    program.call('brk', f'{now}+{grow * PAGE}')


@operation(page=page, length=length, offset=st.integers(0, 4))
def remap_file_pages(program: Program, page: int, length: int, offset: int) -> None:
    program.call('remap_file_pages', at(page), length * PAGE, 0, offset, 0)
