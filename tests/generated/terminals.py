# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on pseudo-terminals."""

import struct

from hypothesis import strategies as st

from tests.generated.files import number
from tests.generated.programs import Program, operation

TIOCSPTLCK, TIOCGPTPEER, TIOCSWINSZ, TIOCPKT, TIOCEXCL, TIOCSCTTY = 0x40045431, 0x5441, 0x5414, 0x5420, 0x540C, 0x540E
TCSETS2 = 0x402C542B
# c_iflag, c_oflag, c_cflag, c_lflag of a shell's terminal, and of one in raw mode
SETTINGS = ((0x4500, 0x5, 0xBF, 0x8A3B), (0, 0, 0xBF, 0), (0x500, 0x1, 0xBD, 0x8A31))


@operation(flags=st.sampled_from([0, 0o4000, 0o2000000]), slave=st.sampled_from(['never', 'open', 'closed']),
           locked=st.booleans(), orphan=st.booleans())
def make_terminal(program: Program, flags: int, slave: str, locked: bool, orphan: bool) -> None:
    """O_RDWR and O_NOCTTY. orphan: the master is closed."""
    master = program.call('open', b'/dev/ptmx\0', 0o402 | flags, 0)
    program.call('ioctl', master, TIOCSPTLCK, struct.pack('<i', 0))
    if slave != 'never':
        peer = program.call('ioctl', master, TIOCGPTPEER, 0o402 | flags)
        if slave == 'closed':
            program.call('close', peer)
        else:
            program.add_file(peer)
    if locked:
        program.call('ioctl', master, TIOCSPTLCK, struct.pack('<i', 1))
    if orphan:
        program.call('close', master)
    else:
        program.add_file(master, is_shared=True)        # its mode is that of /dev/ptmx


@operation(file=number, rows=st.integers(0, 200), columns=st.sampled_from([0, 80, 65535]))
def set_window_size(program: Program, file: int, rows: int, columns: int) -> None:
    program.call('ioctl', program.file(file), TIOCSWINSZ, struct.pack('<4H', rows, columns, 5, 6))


@operation(file=number, setting=st.sampled_from(SETTINGS), speed=st.sampled_from([9600, 38400]))
def set_terminal(program: Program, file: int, setting: tuple[int, ...], speed: int) -> None:
    characters = bytes([3, 28, 127, 21, 4, 0, 1, 0, 17, 19, 26, 0, 18, 15, 23, 22, 0, 0, 0])
    program.call('ioctl', program.file(file), TCSETS2, struct.pack('<4IB19s2I', *setting, 0, characters, speed, speed))


@operation(file=number, request=st.sampled_from([TIOCPKT, TIOCEXCL]))
def set_terminal_mode(program: Program, file: int, request: int) -> None:
    """Packet mode, exclusive mode."""
    program.call('ioctl', program.file(file), request, struct.pack('<i', 1))


@operation(file=number)
def take_terminal(program: Program, file: int) -> None:
    """A new session whose controlling terminal it is."""
    program.call('setsid')
    program.call('ioctl', program.file(file), TIOCSCTTY, 0)
