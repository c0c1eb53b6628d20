# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl in a sandbox: python -m tests.daemon.confined UID WAY ADDRESS COMMAND...

It starts a child that sleeps, puts on what WAY says ('seccomp', or '' where the sandbox is around it already), becomes
that user, and runs each command in this process, 'CHILD' standing for its child's pid. Says in a line of JSON the exit
status of each, and what it said.
"""

import concurrent.futures.thread  # noqa: F401 - another user is not to look for it
import contextlib
import ctypes
import importlib
import io
import json
import os
import signal
import struct
import sys

from ckptd.cli.arguments import COMMANDS
from ckptd.cli.main import main
from ckptd.kernel.prctl import prctl

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2             # <linux/prctl.h>, <linux/seccomp.h>
BPF_RET, SECCOMP_RET_ALLOW = 0x06, 0x7FFF0000


def put_on_filter() -> None:
    """Of one instruction: everything is allowed."""
    code = ctypes.create_string_buffer(struct.pack('HBBI', BPF_RET, 0, 0, SECCOMP_RET_ALLOW))
    program = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 1, ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def become(uid: int) -> None:
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def start_child(uid: int) -> int:
    pid = os.fork()
    if pid == 0:
        become(uid)
        with open(os.devnull) as null:  # noqa: PTH123
            for fd in (0, 1, 2):
                os.dup2(null.fileno(), fd)
        os.execvp('sleep', ['sleep', '1000'])
    return pid


def run(command: str) -> tuple[int, str]:
    """A command line of ckptctl: its exit status, and what it said."""
    said = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = main(command.split())
        except SystemExit as end:
            status = int(end.code or 0)
    said.seek(0)
    return status, said.read()


def main_() -> None:
    uid, way, address, *commands = sys.argv[1:]
    for command in COMMANDS.values():       # all modules, while they can be read
        importlib.import_module(f'ckptd.cli.{command.handler.partition(":")[0]}')
    child = start_child(int(uid))
    if way == 'seccomp':        # by root: an ordinary user would need no_new_privs for that
        put_on_filter()
    become(int(uid))
    try:
        lines = [command.replace('CHILD', str(child)).partition(' ') for command in commands]
        print(json.dumps([run(f'{verb} --address {address} {rest}') for verb, _, rest in lines]))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == '__main__':
    main_()
