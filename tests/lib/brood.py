# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forked children for tests of the lower layers: each does its work, says so, and lives until the test is done."""

import contextlib
import ctypes
import json
import os
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, Self

PR_SET_DUMPABLE = 4     # <linux/prctl.h>

libc = ctypes.CDLL(None, use_errno=True)


class Brood:
    """`with Brood() as brood: child = brood.fork(work)`. work() runs in the child and may fork further ones itself.

    All wait for the end of one pipe, whose only write end is the test's; so none outlives it, whoever its parent is.
    """

    def __enter__(self) -> Self:
        self.life, self._end = os.pipe()
        self.pids: list[int] = []
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._end)
        os.close(self.life)
        for pid in self.pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def fork(self, work: Callable[[], Any] = lambda: None) -> int:
        """The pid of a child that has done work() and now waits."""
        return self.ask(work)[0]

    def ask(self, work: Callable[[], Any]) -> tuple[int, Any]:
        """The same, with what work() returned, which JSON must be able to carry."""
        ready, theirs = os.pipe()
        pid = fork()
        if pid == 0:
            os.close(ready)
            self._run(work, theirs)
        os.close(theirs)
        self.pids.append(pid)
        with os.fdopen(ready, 'rb') as answer:
            data = answer.readline()        # not to the end: a grandchild has the write end too
        assert data, f'child {pid} failed, see its traceback'
        return pid, json.loads(data)

    def _run(self, work: Callable[[], Any], ready: int) -> NoReturn:
        try:
            if self._end != -1:     # in a grandchild it is closed already
                os.close(self._end)
                self._end = -1
            os.write(ready, json.dumps(work()).encode() + b'\n')
            os.close(ready)
            self.wait()
        finally:
            os._exit(0)

    def wait(self) -> None:
        """Return when the test is done; for threads of a child."""
        os.read(self.life, 1)


def fork() -> int:
    with warnings.catch_warnings():
        # 3.12 warns when there are threads, and pytest-xdist has some; the children use nothing of theirs
        warnings.simplefilter('ignore', DeprecationWarning)
        return os.fork()


def become(uid: int) -> None:
    """Be this user, as a program that was started by it is: without rights, and dumpable."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
