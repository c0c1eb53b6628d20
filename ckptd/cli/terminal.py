# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pseudo-terminal between the user's terminal and a tree (pty(7)). Bytes go both ways, and so does the window size.

    user's terminal, raw  <- fd 0, fd 1 ->  this command  <- master | slave ->  the tree, for which it is any terminal

The tree cannot have the user's own terminal, which is the controlling terminal of the shell's session.
"""

import asyncio
import contextlib
import fcntl
import os
import signal
import termios
import tty
from types import TracebackType
from typing import Self

from ckptd.cli.keeper import Keeper

CHUNK = 1 << 16
WINDOW = bytes(8)       # struct winsize (ioctl_tty(2))


class Terminal:
    """A terminal made with the settings and size of the one on fd 0. `slave` is the tree's side, open until `begin`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = termios.tcgetattr(0)
        self._master, self.slave = os.openpty()
        termios.tcsetattr(self.slave, termios.TCSANOW, self._settings)
        self._resize()
        os.set_blocking(self._master, False)
        self._typed = bytearray()
        self._began = self._is_trees = False
        self._keeper = Keeper(self._master)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        """Show what the tree has written and restore the settings of the user's terminal."""
        if self._began:
            with contextlib.suppress(OSError):
                while True:
                    self._show()
            self._end()
        self._close_slave()
        self._keeper.close(is_ours=not self._is_trees)
        os.close(self._master)

    def begin(self) -> None:
        """Connect the user's terminal to the tree."""
        self._began = self._is_trees = True
        self._close_slave()
        tty.setraw(0, termios.TCSADRAIN)
        self._loop.add_signal_handler(signal.SIGWINCH, self._resize)
        self._resize()
        self._loop.add_reader(0, self._read)
        self._loop.add_reader(self._master, self._write)

    def _end(self) -> None:
        """Give the terminal back to the user. A second call does nothing."""
        if not self._began:
            return
        self._began = False
        for fd in (0, self._master):
            self._loop.remove_reader(fd)
        self._loop.remove_writer(self._master)
        self._loop.remove_signal_handler(signal.SIGWINCH)
        termios.tcsetattr(0, termios.TCSADRAIN, self._settings)

    def _close_slave(self) -> None:
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1

    def _resize(self) -> None:
        """Set the window size. The kernel sends SIGWINCH to the tree."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, WINDOW))

    def _write(self) -> None:
        try:
            self._show()
        except BlockingIOError:
            return
        except OSError:
            # EIO: the tree has no terminal, or has closed it (pty(7)). Ctrl-C becomes a signal again, which is passed
            # on.
            self._end()

    def _show(self) -> None:
        """Show some of the tree's output. BlockingIOError when there is no more for now, OSError when it cannot be
        written."""
        data = os.read(self._master, CHUNK)
        while data:
            data = data[os.write(1, data):]

    def _read(self) -> None:
        """Read typed characters. End-of-file means that the terminal was hung up and no more will come."""
        data = b''
        with contextlib.suppress(OSError):
            data = os.read(0, CHUNK)
        if not data:
            self._loop.remove_reader(0)
        self._typed += data
        self._feed()

    def _feed(self) -> None:
        """Pass on typed characters. If the tree does not read them, at most one CHUNK waits here."""
        try:
            del self._typed[:os.write(self._master, self._typed)]
        except BlockingIOError:
            self._loop.remove_reader(0)
            self._loop.add_writer(self._master, self._resume)
        except OSError:
            self._typed.clear()     # the tree does not read; `_write` will notice that, too

    def _resume(self) -> None:
        self._loop.remove_writer(self._master)
        self._loop.add_reader(0, self._read)
        self._feed()
