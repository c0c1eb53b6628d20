# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server and a client of it in one tree: python served MODULE.CLASS PORT.

The client keeps its connections. A line in the FIFO `ask` lets it use them once; it answers with a line in the FIFO
`answer`: the number of the round, or what is wrong. Servers keep no file but in the working directory.
"""

import importlib
import os
import sys
import traceback


def main(name: str, port: str) -> None:
    module, _, server = name.partition('.')
    os.mkfifo('ask')
    os.mkfifo('answer')
    asks, answers = os.open('ask', os.O_RDWR | os.O_CLOEXEC), os.open('answer', os.O_RDWR | os.O_CLOEXEC)
    number, served = 0, getattr(importlib.import_module(module), server)(int(port))
    os.write(answers, b'0\n')
    while os.read(asks, 100):
        number += 1
        try:
            served.use(number)
            os.write(answers, b'%d\n' % number)
        except Exception:       # noqa: BLE001 -- whatever it is, the test shows it
            os.write(answers, traceback.format_exc().replace('\n', ' / ').encode()[:4000] + b'\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
