# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs with windows on an X server (Xvfb) of the same tree, typed into by xdotool, which is in it as well."""

import os
import subprocess
import time
from pathlib import Path

from base import Served, is_

TK = """
import tkinter
window = tkinter.Tk()
window.geometry('300x100+0+0')
entry, label = tkinter.Entry(window, insertofftime=0), tkinter.Label(window, text='-')
def enter(event):
    label['text'] = entry.get()
    with open('typed', 'a') as file:
        file.write(entry.get() + chr(10))
    entry.delete(0, 'end')
entry.bind('<Return>', enter)
entry.pack(fill='both', expand=True)
label.pack()
entry.focus_force()
window.mainloop()
"""


class Windows(Served):
    """A program whose window writes what is typed into the file `typed`. The screen stays as it is between rounds."""
    command: tuple[str, ...]

    def start(self) -> None:
        reader, writer = os.pipe()
        with Path('xvfb.log').open('wb') as log:
            self.screen = subprocess.Popen(['Xvfb', '-displayfd', str(writer), '-screen', '0', '400x300x24'],
                                           stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writer])
        os.close(writer)
        with os.fdopen(reader) as said:
            os.environ['DISPLAY'] = f':{said.readline().strip()}'
        Path('display').write_text(os.environ['DISPLAY'])
        self.run(*self.command)
        subprocess.run(['xdotool', 'search', '--sync', '--onlyvisible', '--class', type(self).__name__],
                       stdout=subprocess.DEVNULL, check=True, timeout=60)
        # without a window manager the window below the pointer has the keyboard; Tk wants a click as well
        self.do('mousemove', '50', '20', 'click', '1')
        self.number = 0

    def do(self, *command: str) -> None:
        subprocess.run(['xdotool', *command], check=True, timeout=60)

    def picture(self) -> bytes:
        """The pixels of the screen, once they do not change any more."""
        last = b''
        while (now := subprocess.run(['xwd', '-root', '-silent'], stdout=subprocess.PIPE, check=True,
                                     timeout=60).stdout) != last:
            last = now
            time.sleep(0.2)
        return last

    def use(self, number: int) -> None:
        before = self.picture()
        if number > 1:
            assert before == self.before, 'the screen is another one'
        self.do('type', self.line(number))
        self.do('key', 'Return')
        deadline = time.monotonic() + 20
        while self.typed() != [str(one) for one in range(1, number + 1)] and time.monotonic() < deadline:
            time.sleep(0.01)
        is_(self.typed(), [str(one) for one in range(1, number + 1)])
        self.before = self.picture()
        assert self.before != before, 'what was typed is not shown'

    def line(self, number: int) -> str:
        """What is typed in this round."""
        return str(number)

    def typed(self) -> list[str]:
        return Path('typed').read_text().split() if Path('typed').exists() else []


class XTerm(Windows):
    """A shell in an xterm(1), whose window has the size that it tells."""
    command = ('xterm', '-geometry', '40x10+0+0', '-e', 'env', 'PS1=$ ', 'bash', '--norc', '--noprofile')

    def line(self, number: int) -> str:
        return f'echo {number} >> typed; stty size > size'

    def use(self, number: int) -> None:
        super().use(number)
        while not Path('size').exists() or Path('size').read_text() != '10 40\n':
            time.sleep(0.01)
        Path('size').unlink()


class Tk(Windows):
    """An entry and a label of Tk, by the system's Python."""
    command = ('/usr/bin/python3', '-c', TK)
